"""Products over all channels of a chunk's features or values, in slices, so that what is in registers stays small.

Letters and the decays of chunk and level as in `gpu_kernels.py`. Features and values are each other's mirror image:
A_ab = sum of the features' channels is to the values what dA_ab = sum of the values' channels is to the features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

ROWS_ROWS, TRANSPOSED = ((1,), (1,)), ((0,), (0,))  # x y^T and x^T y
SLICE = 64  # channels of a slice
NARROW = 32  # of one of float32, whose products hold three parts of each number, or of decays of channels


class Side(NamedTuple):
    """Names of the operands of rows, of keys and of their decay."""

    row: str
    key: str
    decay: str


FEATURES, VALUES = Side("q", "k", "g"), Side("dnum", "v", "h")


@dataclass(frozen=True)
class Contracted:
    """Products of one chunk that sum over the channels of `side`, all of which `ins` has."""

    dot: Callable
    ins: dict[str, Any]
    C: int
    side: Side

    def pairs(self, j, level=None):
        """Rows of head j times keys, [C, C]; with the decay's factors of a level, of pairs in two halves of it."""

        def add(at, sums):
            return sums + self.dot(self.rows(j, at, level), self.keys(at, level), ROWS_ROWS)

        return self._sliced(add, jnp.zeros((self.C, self.C), jnp.float32))

    def own(self, j):
        """Each row of head j times the key of its position, [C, 1]."""

        def add(at, sums):
            return sums + (self.rows(j, at) * self.keys(at)).sum(1, keepdims=True)

        return self._sliced(add, jnp.zeros((self.C, 1), jnp.float32))

    def through(self, name, read, phases, vector=None):
        """Sum over parts p of phase_p x Z_p, Z the state `name` and x = read(slice), and of phase_p x z_p with z the
        `vector` of that name, or 0.0: [C, channels of the other side] and [C, 1]."""
        state, parts = self.ins[name], range(len(phases))
        of_features = self.side is FEATURES
        zeros = [jnp.zeros((self.C, state.shape[2 if of_features else 1]), jnp.float32)] * len(phases)
        column = [jnp.zeros((self.C, 1), jnp.float32)] * (len(phases) if vector else 0)

        def add(at, sums):
            x = read(at)
            some = [state[p, at, :] if of_features else state[p, :, at] for p in parts]
            over = ((1,), (0,)) if of_features else ROWS_ROWS
            wide = [sums[0][p] + self.dot(x, some[p], over, exact=True) for p in parts]
            thin = [
                one + (x * self.ins[vector][p, at][None]).sum(1, keepdims=True)
                for p, one in enumerate(sums[1])
            ]
            return wide, thin

        both = self._sliced(add, (zeros, column))
        return tuple(sum(map(scaled, of_parts, phases[: len(of_parts)]), 0.0) for of_parts in both)

    def rows(self, j, at, level=None):
        """A slice of the rows of head j, [C, slice] in float32, decayed from where the level's block begins."""
        x = self.ins[self.side.row][:, j, at].astype(jnp.float32)
        return x if level is None else scaled(x, exp_sums(self.dot, up_to(level, self.C), self._decay(at)))

    def keys(self, at, level=None):
        """A slice of the keys, [C, slice] in float32, decayed to where the level's block ends."""
        x = self.ins[self.side.key][:, at].astype(jnp.float32)
        return x if level is None else scaled(x, exp_sums(self.dot, after(level, self.C), self._decay(at)))

    def _decay(self, at):
        if self.side.decay not in self.ins:
            return None
        decay = self.ins[self.side.decay]
        return decay[...][:, None] if len(decay.shape) == 1 else decay[:, at]

    def _sliced(self, add, sums):
        by_channel = "h" in self.ins or ("g" in self.ins and len(self.ins["g"].shape) == 2)
        narrow = by_channel or self.ins["k"].dtype == jnp.float32
        size = self.ins[self.side.key].shape[1]
        step = (
            NARROW if narrow or size <= SLICE else SLICE
        )  # in a loop always: straight code mixes the slices
        if size <= step:
            return add(slice(None), sums)
        return jax.lax.fori_loop(0, size // step, lambda n, sums: add(pl.ds(n * step, step), sums), sums)


def level_factors(dot, level, C, g):
    """Those of rows in second halves and of keys in first ones; of the whole chunk at the last level."""
    return exp_sums(dot, up_to(level, C), g), exp_sums(dot, after(level, C), g)


def exp_sums(dot, of, g):
    return None if g is None else jnp.exp(summed(dot, of, g))


def summed(dot, of, g):
    """Sums of g [C, X] over the positions that each row of `of` [C, C] marks."""
    if g.shape[1] == 1:
        return jnp.where(of, g.reshape(1, -1), 0).sum(1, keepdims=True)
    return dot(of, g, exact="sums")


def back(dot, of, d):
    """The gradient of g from that of its sums."""
    if d.shape[1] == 1:
        return jnp.where(of, d, 0).sum(0, keepdims=True).reshape(-1, 1)
    return dot(of, d, TRANSPOSED, exact="sums")


def levels(C):
    return C.bit_length() - 1


def up_to(level, C):
    """Positions l <= a of a's block of 2^level, bool [C, C]."""
    return (block(column(C), level) == block(row(C), level)) & (row(C) <= column(C))


def after(level, C):
    """Positions l > b of b's block of 2^level, bool [C, C]."""
    return (block(column(C), level) == block(row(C), level)) & (row(C) > column(C))


def pairs_of(level, C):
    """Row a in the second and key b in the first half of the same 2^(level + 1) positions, bool [C, C]."""
    a, b = block(column(C), level), block(row(C), level)
    return (a & 1 == 1) & (b + 1 == a)


def block(position, level):
    """position // 2^level."""
    return jax.lax.shift_right_logical(position, jnp.full(position.shape, level, jnp.int32))


def column(C):
    return jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0)


def row(C):
    return jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)


def scaled(x, factor):
    return x if factor is None else x * factor
