"""Tropical attention as a GPU kernel (Pallas-Triton): memory linear in T and S, T x S x D work in registers.

Letters: see the package; Bq, Bk blocks of queries and keys, Tp, Sp, Dvp sizes filled up to them and to a power of two.
A program has one block of queries and runs over the blocks of keys that it sees. A tile in registers cannot be indexed,
so the scores of a block pass through a Bq x Bk scratch of the program, which its cache holds.

    S^T [Bk, Bq]: one channel d at a time, a column of queries and a row of keys read for it
    c, j [Bq, Dvp]: one key at a time, strictly larger sums win
A maximum is exact and every sum is rounded once, so values and winners are those of the dense form to the bit.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import masks, pallas
from kernels.tropical import tiles, vectors
from kernels.tropical.attention import gradients
from kernels.tropical.attention.arguments import Arguments, BlockSizes
from kernels.tropical.attention.gpu_backward import winning_channels

BLOCK = 64  # queries and keys of a block, where the lengths reach that far
SMALLEST = 16


def why_unsupported(arguments: Arguments) -> str | None:
    """The kernel has hard maxima only, float32, and head sizes of values that fit its registers."""
    if arguments.v.shape[3] > 256:
        return f"Dv={arguments.v.shape[3]} is above 256, what registers hold; take implementation='blockwise'"
    return vectors.why_not_float32(arguments.q.dtype) or vectors.why_not_hard(arguments.beta)


def pallas_gpu(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """Context c [B, T, H, Dv] float32, -inf where no key is visible, and its winners int32 (-1 there)."""
    a, how = arguments, pallas.interpret()
    mask = dataclasses.replace(a.mask, q_offset=jnp.asarray(a.mask.q_offset, jnp.int32))
    sizes = _block_sizes(a.q.shape[1], a.k.shape[1], a.v.shape[3], a.block_sizes)
    options = _Options(a.score, a.score_scale, sizes, how)
    return _attend(options, a.q, a.k, a.v, a.bias, a.slopes, mask)


@dataclass(frozen=True)
class _Options:
    score: str
    scale: float
    sizes: BlockSizes
    interpret: Any


def _block_sizes(T, S, Dv, given):
    """Powers of two, at least 16; sizes asked for are rounded up."""
    most = BLOCK if Dv <= 128 else BLOCK // 2
    wanted = given or BlockSizes(min(most, T), min(BLOCK, S))
    return BlockSizes(*(max(SMALLEST, pl.next_power_of_2(size)) for size in (wanted.q, wanted.k)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, bias, slopes, mask):
    (B, T, H, D), (S, K, Dv), (Bq, Bk) = q.shape, v.shape[1:], dataclasses.astuple(options.sizes)
    q = vectors.pad(q.transpose(0, 2, 3, 1), 3, Bq)  # [B, H, D, Tp]
    k = vectors.pad(k.transpose(0, 2, 3, 1), 3, Bk)  # [B, K, D, Sp]
    v = vectors.pad(vectors.pad(v.swapaxes(1, 2), 2, Bk), 3, max(SMALLEST, pl.next_power_of_2(Dv)))
    Tp, Sp, Dvp, nq = q.shape[3], *v.shape[2:], q.shape[3] // Bq
    of_rows = pl.BlockSpec((None, None, Bq, Dvp), lambda i, h, b: (b, h, i, 0))
    operands, specs = _visibility(mask, B, T, S, options.sizes)
    operands |= {"q": q, "k": k, "v": v}
    specs["q"] = pl.BlockSpec((None, None, D, Bq), lambda i, h, b: (b, h, 0, i))
    specs["k"] = pl.BlockSpec((None, None, D, Sp), lambda i, h, b: (b, jax.lax.div(h, H // K), 0, 0))
    specs["v"] = pl.BlockSpec((None, None, Sp, Dvp), lambda i, h, b: (b, jax.lax.div(h, H // K), 0, 0))
    if slopes is not None:
        operands["slopes"], specs["slopes"] = slopes, pl.BlockSpec((1,), lambda i, h, b: (h,))
    if bias is not None:
        full = tuple(size > 1 for size in bias.shape)
        bias = vectors.pad(bias, 2, Bq) if full[2] else bias
        operands["bias"] = vectors.pad(bias, 3, Bk) if full[3] else bias
        specs["bias"] = pl.BlockSpec(
            (None, None, Bq if full[2] else 1, operands["bias"].shape[3]),
            lambda i, h, b: (b * full[0], h * full[1], i * full[2], 0),
        )
    c, j, _ = pl.pallas_call(
        partial(_kernel, options, (mask.causal, mask.window), tuple(operands)),
        grid=(nq, H, B),
        in_specs=list(specs.values()),
        out_specs=[
            of_rows,
            of_rows,
            pl.BlockSpec((None, None, None, Bk, Bq), lambda i, h, b: (b, h, i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, H, Tp, Dvp), jnp.float32),
            jax.ShapeDtypeStruct((B, H, Tp, Dvp), jnp.int32),
            jax.ShapeDtypeStruct((B, H, nq, Bk, Bq), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4 if Bq * Dvp <= 4096 else 8, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=int(B * H * Tp * Sp * (3 * D + 4 * Dvp) * (0.5 if mask.causal else 1)),
            transcendentals=0,
            bytes_accessed=4 * (q.size + k.size + v.size + 2 * B * H * Tp * Dvp),
        ),
        interpret=options.interpret,
        name="tropical_attention_forward",
    )(*operands.values())
    return tuple(x[:, :, :T, :Dv].swapaxes(1, 2) for x in (c, j))


def _visibility(mask, B, T, S, sizes):
    """Operands and specifications that say which keys a block of queries sees: its range of blocks, and the mask."""
    blocks = masks.visible_blocks(mask, T, S, sizes.q, sizes.k)
    bounds = jnp.stack(masks.key_block_range(blocks), -1)
    starts = jnp.zeros((B,), jnp.int32) if mask.starts is None else mask.starts.astype(jnp.int32)
    lengths = (
        jnp.full((B,), S, jnp.int32)
        if mask.lengths is None
        else jnp.minimum(mask.lengths, S).astype(jnp.int32)
    )
    operands = {
        "bounds": jnp.broadcast_to(bounds, (B, *bounds.shape[1:])),
        "starts": starts,
        "lengths": lengths,
        "offset": mask.q_offset[None],
    }
    specs = {
        "bounds": pl.BlockSpec((None, None, 2), lambda i, h, b: (b, i, 0)),
        "starts": pl.BlockSpec((1,), lambda i, h, b: (b,)),
        "lengths": pl.BlockSpec((1,), lambda i, h, b: (b,)),
        "offset": pl.BlockSpec((1,), lambda i, h, b: (0,)),
    }
    if mask.q_segments is not None:
        operands["q_segments"] = vectors.pad(mask.q_segments.astype(jnp.int32), 1, sizes.q)
        operands["kv_segments"] = vectors.pad(mask.kv_segments.astype(jnp.int32), 1, sizes.k)
        specs["q_segments"] = pl.BlockSpec((None, sizes.q), lambda i, h, b: (b, i))
        specs["kv_segments"] = pl.BlockSpec((None, operands["kv_segments"].shape[1]), lambda i, h, b: (b, 0))
    return operands, specs


def _kernel(options, causal_window, names, *refs):
    """q [D, Bq], k [D, Sp], v [Sp, Dvp] -> c, j [Bq, Dvp]; scratch [Bk, Bq]."""
    given = dict(zip(names, refs, strict=False))
    c_ref, j_ref, scratch = refs[len(names) :]
    (Bk, Bq), v = scratch.shape, given["v"]
    first, end, top = given["bounds"][0], given["bounds"][1], pl.program_id(0) * Bq

    def wait():
        if not options.interpret:
            plgpu.debug_barrier()

    def keys(n, carry):
        left = pl.multiple_of(n * Bk, Bk)
        s = options.scale * _scores(options.score, given["q"], given["k"], left, Bk)
        s = _visible(given, causal_window, s, top, left)
        wait()  # scores of the block before have been read
        scratch[...] = s
        wait()

        def key(u, carry):
            c, j = carry
            t = scratch[u, :][:, None] + v[left + u, :][None, :]
            return jnp.maximum(c, t), jnp.where(t > c, left + u, j)

        return tiles.fold(Bk, key, carry)

    c_ref[...], j_ref[...] = jax.lax.fori_loop(first, end, keys, tiles.nothing(c_ref.shape, jnp.float32))


def _scores(score, q, k, left, Bk):
    """Raw scores [Bk, Bq] of q [D, Bq] and Bk keys of k [D, Sp] from `left`."""
    D, shape = q.shape[0], (Bk, q.shape[1])
    low, high = jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)

    def channel(d):
        return q[d, :][None, :], k[d, pl.ds(left, Bk)][:, None]

    if score == "maxplus_dot":
        return tiles.fold(D, lambda d, high: jnp.maximum(high, sum(channel(d))), high)
    if score == "hilbert":

        def step(d, carry):
            of_q, of_k = channel(d)
            return jnp.minimum(carry[0], of_q - of_k), jnp.maximum(carry[1], of_q - of_k)

        low, high = tiles.fold(D, step, (low, high))
        return low - high

    def step_asym(d, carry):
        of_q, of_k = channel(d)
        return jnp.minimum(carry[0], of_q - of_k), carry[1] + of_q, carry[2] + of_k

    zeros = jnp.zeros((1, shape[1]), jnp.float32), jnp.zeros((Bk, 1), jnp.float32)
    low, of_q, of_k = tiles.fold(D, step_asym, (low, *zeros))
    return D * low - (of_q - of_k)


def _visible(given, causal_window, s, top, left):
    """Slope and bias added to scores [Bk, Bq], -inf where `masks.visible` has it."""
    (Bk, Bq), (causal, window) = s.shape, causal_window
    rows = given["offset"][0] + top + jnp.arange(Bq, dtype=jnp.int32)[None, :]
    cols = left + jnp.arange(Bk, dtype=jnp.int32)[:, None]
    if "slopes" in given:
        s = s - given["slopes"][0] * (rows - cols).astype(s.dtype)
    if "bias" in given:
        bias = given["bias"]
        of_rows = pl.ds(0, Bq) if bias.shape[0] > 1 else 0
        of_cols = pl.ds(left, Bk) if bias.shape[1] > 1 else 0
        found = bias[of_rows, of_cols]
        s = s + (found.T if found.ndim == 2 else found[:, None] if bias.shape[1] > 1 else found)
    seen = (cols >= given["starts"][0]) & (cols < given["lengths"][0])
    if causal:
        seen &= cols <= rows
    if window is not None:
        seen &= rows - cols < window
    if "q_segments" in given:
        of_rows, of_cols = given["q_segments"][...][None, :], given["kv_segments"][pl.ds(left, Bk)][:, None]
        seen &= (of_rows == of_cols) & (of_rows != 0)
    return jnp.where(seen, s, -jnp.inf)


def _forward(options, q, k, v, bias, slopes, mask):
    c, j = _attend(options, q, k, v, bias, slopes, mask)
    return (c, j), (q, k, v.shape, bias, slopes, mask.q_offset, j)


def _backward(options, residuals, cotangents):
    q, k, shape, bias, slopes, offset, j = residuals
    g = jnp.where(j >= 0, cotangents[0], 0)
    channels = winning_channels(options.score, options.interpret, q, k, j)
    dq, dk, dv = gradients.of_channels(options.score, options.scale, q.shape, shape, channels, j, g)
    dbias = None if bias is None else gradients.of_bias(bias, j, g)
    dslopes = None if slopes is None else gradients.of_slopes(offset, j, g)
    return dq, dk, dv, dbias, dslopes, None


_attend.defvjp(_forward, _backward)
