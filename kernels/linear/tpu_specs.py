"""The arrays of the TPU kernel: which block of each a grid step takes, their shapes, and what a call costs.

Letters as in `tpu_forward.py`. The grid is (B, J, N); J steps over heads share K key/value heads, `blocks` a head.
Operands:

    q [B, J, G, L, D]   k [B, K, L, D]   v [B, K, L, E]   state [B, K, P, D, E]   ones [B, K, P, D]
    key_decay [B, K, N, 1, C] (a number) or [B, K, L, D]   value_decay [B, K, L, E]

and constants: bounds int32 [B, N + 1], the run of the state at each chunk's start; runs int32 [B, N, 1, C]; level int32
[C, C]; of an angle toe [B or 1, C, C], phases [B or 1, 4, C, 1] and turn [B or 1, 2, 1].
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.linear.tpu_chunk import Plan

OF_HEADS = ("num", "q", "dnum", "dq")  # [B, J, G, L, X]
OF_LENGTH = ("k", "v", "dk", "dv", "value_decay", "dvalue_decay")  # [B, K or J, L, X]
STATES = ("state", "ones", "end", "end_ones", "dend", "dend_ones", "dstate", "dones")


class Specs:
    """backward: chunks are taken from the last to the first."""

    def __init__(self, plan: Plan, operands: dict, constants: dict, backward: bool = False):
        self.plan, self.backward = plan, backward
        self.arrays = operands | constants
        (self.B, self.J, self.G, self.L, self.D), self.E = operands["q"].shape, operands["v"].shape[3]
        self.K = operands["k"].shape[1]
        self.grid = (self.B, self.J, plan.chunks)
        P = plan.parts
        self.scratch_names = ("Z", "z") if plan.denominator else ("Z",)
        self.scratch = [pltpu.VMEM((P, self.D, self.E), jnp.float32)]
        self.scratch += [pltpu.VMEM((P, self.D), jnp.float32)] * plan.denominator

    def shape(self, name: str) -> jax.ShapeDtypeStruct:
        """Of an output. Gradients of what key/value heads share are one a grid step over heads."""
        B, J, G, L, D, E, P = self.B, self.J, self.G, self.L, self.D, self.E, self.plan.parts
        N, C, dtype = self.plan.chunks, self.plan.chunk, jnp.float32
        shapes = {
            "num": (B, J, G, L, E), "den": (B, J, N, G, C), "end": (B, J, P, D, E), "end_ones": (B, J, P, D),
            "starts": (B, J, N, P, D, E), "starts_ones": (B, J, N, P, D), "dq": (B, J, G, L, D), "dk": (B, J, L, D),
            "dv": (B, J, L, E), "dkey_decay": (B, J, L, D) if self.plan.keys else (B, J, N, 1, C),
            "dvalue_decay": (B, J, L, E), "dstate": (B, J, P, D, E), "dones": (B, J, P, D),
        }  # fmt: skip
        whole = self.plan.blocks == 1  # else gradients of k and v are summed first
        if name == "dq" or (name in ("dk", "dv") and whole):
            dtype = self.arrays[name[1:]].dtype
        return jax.ShapeDtypeStruct(shapes[name], dtype)

    def block(self, name: str) -> pl.BlockSpec:
        """Of an input or output."""
        C, N, shape = self.plan.chunk, self.plan.chunks, self._whole(name)
        shared = name in ("k", "v", "key_decay", "value_decay", "state", "ones")  # inputs of a key/value head
        blocks = self.plan.blocks if shared else 1

        def at(n):
            return N - 1 - n if self.backward else n

        def of(j):
            return lax.div(j, jnp.int32(blocks)) if blocks > 1 else j

        tail = (0,) * (len(shape) - 3)
        if name in OF_HEADS:
            return pl.BlockSpec((1, 1, self.G, C, shape[4]), lambda b, j, n, _: (b, j, 0, at(n), 0))
        if name in OF_LENGTH or (name in ("key_decay", "dkey_decay") and self.plan.keys):
            return pl.BlockSpec((1, 1, C, shape[3]), lambda b, j, n, _: (b, of(j), at(n), 0))
        if name in STATES:
            return pl.BlockSpec((1, 1, *shape[2:]), lambda b, j, n, _: (b, of(j), 0, *tail))
        if name == "runs":
            return pl.BlockSpec((1, 1, 1, C), lambda b, j, n, _: (b, at(n), 0, 0))
        if name == "level":
            return pl.BlockSpec((C, C), lambda b, j, n, _: (0, 0))
        if name in ("toe", "phases", "turn"):
            rest = (0,) * (len(shape) - 1)
            return pl.BlockSpec((1, *shape[1:]), lambda b, j, n, _: (b if shape[0] > 1 else 0, *rest))
        # A row a chunk: den, dden, decays of one number, and the states at chunks' starts.
        return pl.BlockSpec((1, 1, 1, *shape[3:]), lambda b, j, n, _: (b, of(j), at(n), *tail))

    def cost(self, inputs, outputs, sweeps: int) -> pl.CostEstimate:
        """sweeps: how often the work of a forward pass is done."""
        p, rows = self.plan, self.B * self.J * self.G * self.L
        levels = math.log2(p.chunk) + 1
        pairs = p.chunk * (self.D * (levels if p.keys else 1) + self.E * (levels if p.values else 1))
        flops = 2 * rows * (pairs + 2 * p.parts * self.D * self.E)
        channels = self.D * p.keys + self.E * p.values
        arrays = [self.arrays.get(n, None) for n in inputs] + [self.shape(n) for n in outputs]
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays if x is not None)
        return pl.CostEstimate(
            flops=int(sweeps * flops),
            bytes_accessed=moved,
            transcendentals=int(self.B * self.J * self.L * (levels * channels + p.chunk * p.number)),
        )

    def _whole(self, name):
        return (self.arrays[name] if name in self.arrays else self.shape(name)).shape
