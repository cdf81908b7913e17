"""The channels that share in each winner's score: the part of the backward pass that is work, as a GPU kernel.

Letters: see `gpu.py` and `gradients.py`; j the winners, Bi rows of a program. The winner's key is looked up for each
row and channel, so the work is T x Dv x D whatever S, and nothing larger than the winners is stored.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.tropical import tiles, vectors

NUMBERS = 2048  # winners of a program


def winning_channels(score: str, interpret, q, k, j) -> tuple[jax.Array, jax.Array]:
    """(p, m) int32 [B, T, H, Dv]: first argmax and argmin over channels of q_i - k_j (maxplus_dot: of the sum)."""
    (B, T, H, D), (S, K), Dv = q.shape, k.shape[1:3], j.shape[3]
    Dvp = max(16, pl.next_power_of_2(Dv))
    Bi = min(max(1, NUMBERS // Dvp), pl.next_power_of_2(T))
    q = vectors.pad(q.transpose(0, 2, 3, 1), 3, Bi)  # [B, H, D, Tp]
    j = vectors.pad(vectors.pad(j.swapaxes(1, 2), 2, Bi), 3, Dvp)  # [B, H, Tp, Dvp]
    of_rows = pl.BlockSpec((None, None, Bi, Dvp), lambda i, h, b: (b, h, i, 0))
    found = pl.pallas_call(
        partial(_kernel, score),
        grid=(j.shape[2] // Bi, H, B),
        in_specs=[
            pl.BlockSpec((None, None, D, Bi), lambda i, h, b: (b, h, 0, i)),
            pl.BlockSpec((None, S, None, D), lambda i, h, b: (b, 0, jax.lax.div(h, H // K), 0)),
            of_rows,
        ],
        out_specs=[of_rows, of_rows],
        out_shape=[jax.ShapeDtypeStruct(j.shape, jnp.int32)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=7 * j.size * D, transcendentals=0, bytes_accessed=4 * (q.size + k.size + 3 * j.size)
        ),
        interpret=interpret,
        name="tropical_attention_channels",
    )(q, k, j)
    return tuple(x[:, :, :T, :Dv].swapaxes(1, 2) for x in found)


def _kernel(score, q_ref, k_ref, j_ref, p_ref, m_ref):
    """q [D, Bi], k [S, D], j [Bi, Dvp] -> p, m [Bi, Dvp]; strict comparisons keep the first channel."""
    at = jnp.maximum(j_ref[...], 0)

    def channel(d, carry):
        p, high, m, low = carry
        of_q, of_k = q_ref[d, :][:, None], k_ref[at, jnp.full(at.shape, d, jnp.int32)]
        t = of_q + of_k if score == "maxplus_dot" else of_q - of_k
        p, high = jnp.where(t > high, d, p), jnp.maximum(high, t)
        return p, high, jnp.where(t < low, d, m), jnp.minimum(low, t)

    nothing = jnp.zeros(at.shape, jnp.int32), jnp.full(at.shape, jnp.inf, jnp.float32)
    p, _, m, _ = tiles.fold(q_ref.shape[0], channel, (nothing[0], -nothing[1], *nothing))
    p_ref[...], m_ref[...] = p, m
