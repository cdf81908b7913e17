"""Max-plus linear attention as a GPU kernel (Pallas-Triton): the recurrence itself, its state in registers.

Letters: see the package and `tpu.py`, whose codes are used here too. Channels d of the values are independent: a
program, one warp, has a few of them and walks along the tokens; channels d' lie within its threads, so that the
maximum over them hardly leaves a thread. The codes name each winner's key and channel, which is all the backward pass
needs: it adds cotangents at their places, work T x Dv, with nothing looked up again.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import pallas
from kernels.tropical import vectors
from kernels.tropical.linear import tpu
from kernels.tropical.linear.arguments import Arguments
from kernels.tropical.linear.gradients import of_channels
from kernels.tropical.linear.reference import NOTHING
from kernels.tropical.linear.tpu import LARGEST

STATE = 2048  # entries of a program's state: 64 a thread
VALUES = 16  # channels d of a program, at most


def why_unsupported(arguments: Arguments) -> str | None:
    """What the TPU kernel cannot do either, and states that do not fit the registers of a warp."""
    if arguments.q.shape[3] > STATE // 8:
        return f"D={arguments.q.shape[3]} is above {STATE // 8}, what registers hold; take implementation='blockwise'"
    return tpu.why_unsupported(arguments)


def pallas_gpu(arguments: Arguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    """c and winners [B, T, H, Dv] (-1: initial state), and the last state [B, K, D, Dv], float32 and int32."""
    x = dataclasses.replace(arguments, a=jnp.where(arguments.fresh[..., None], -jnp.inf, arguments.a))
    c, j, _, state, _ = _attend(pallas.interpret(), x.q, x.k, x.v, x.a, x.m0)
    return c, j, state


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, q, k, v, a, m0):
    """c, winners and their channels [B, T, H, Dv], state and the origins of its entries [B, K, D, Dv]."""
    (B, T, H, D), (K, Dv), wide = q.shape, v.shape[2:], max(16, pl.next_power_of_2(q.shape[3]))
    q, k = vectors.pad(q, 3, wide), vectors.pad(k, 3, wide, -jnp.inf)
    few = min(VALUES, STATE // wide)
    v, m0 = vectors.pad(v, 3, few), vectors.pad(vectors.pad(m0, 2, wide, -jnp.inf), 3, few)
    Dvp, G = v.shape[3], H // K
    rows = pl.BlockSpec((None, T, G, few), lambda d, h, b: (b, 0, h, d))
    whole = pl.BlockSpec((None, None, wide, few), lambda d, h, b: (b, h, 0, d))
    float_of, int_of = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.float32, jnp.int32))
    c, code, state, codes = pl.pallas_call(
        _kernel,
        grid=(Dvp // few, K, B),
        in_specs=[
            pl.BlockSpec((None, T, None), lambda d, h, b: (b, 0, h)),
            pl.BlockSpec((None, T, G, wide), lambda d, h, b: (b, 0, h, 0)),
            pl.BlockSpec((None, T, None, wide), lambda d, h, b: (b, 0, h, 0)),
            pl.BlockSpec((None, T, None, few), lambda d, h, b: (b, 0, h, d)),
            whole,
        ],
        out_specs=[rows, rows, whole, whole],
        out_shape=[float_of((B, T, H, Dvp)), int_of((B, T, H, Dvp)), float_of(m0.shape), int_of(m0.shape)],
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=B * K * T * wide * Dvp * (5 + 5 * G),
            transcendentals=0,
            bytes_accessed=4 * (q.size + k.size + v.size + 2 * B * T * H * Dvp),
        ),
        interpret=how,
        name="maxplus_linear_forward",
    )(a, q, k, v, m0)
    c, code, state, codes = c[..., :Dv], code[..., :Dv], state[:, :, :D, :Dv], codes[:, :, :D, :Dv]
    return c, code // wide - 1, code % wide, state, codes // wide - 1


def _kernel(a_ref, q_ref, k_ref, v_ref, m0_ref, c_ref, code_ref, end_ref, codes_ref):
    """a [T], q [T, G, D], k [T, D], v [T, few], states [D, few] -> c and code [T, G, few], state and codes [D, few]."""
    (D, few), (T, G, _) = m0_ref.shape, q_ref.shape
    channel = jax.lax.broadcasted_iota(jnp.int32, (D, few), 0)

    def token(t, carry):
        M, code = carry
        M, new = a_ref[t] + M, k_ref[t, :][:, None] + v_ref[t, :][None, :]
        M, code = jnp.maximum(M, new), jnp.where(new <= M, code, (t + 1) * D + channel)
        for g in range(G):
            sums = q_ref[t, g, :][:, None] + M
            c = jnp.max(sums, axis=0)
            c_ref[t, g, :] = c
            code_ref[t, g, :] = jnp.min(jnp.where(sums == c[None, :], code, LARGEST), axis=0)
        return M, code

    end_ref[...], codes_ref[...] = jax.lax.fori_loop(0, T, token, (m0_ref[...], channel))


def _forward(how, q, k, v, a, m0):
    c, j, p, state, origin = _attend(how, q, k, v, a, m0)
    seen = jnp.where(c > -jnp.inf, j, NOTHING)
    return (c, j, p, state, origin), (q.shape, seen, p, jnp.where(state > -jnp.inf, origin, NOTHING))


def _backward(how, residuals, cotangents):
    return of_channels(*residuals, cotangents[0], cotangents[3])


_attend.defvjp(_forward, _backward)
