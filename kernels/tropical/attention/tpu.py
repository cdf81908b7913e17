"""Tropical attention as a TPU kernel: T x S x D work on the vector units, nothing larger than the operands in memory.

Letters: see the package; Tp, Sp lengths filled up to whole blocks, Bq, Bk block sizes, R rows of a block worked on in
registers at once. Queries lie on lanes: a tile of scores is S^T [R keys, Bq], so that a channel of the queries is a row
(read for all sublanes at once) and a channel of R keys a column, spread over lanes once for all Bq / 128 registers.

    per block of queries and keys, R keys at a time       S^T = scale (min_d (q - k) - max_d (q - k)), then mask
                                 , R channels at a time    (c^T, j^T) = first max over keys of S^T + v^T
A maximum is exact and every sum is rounded once, so values and winners are those of the dense form to the bit.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import masks, pallas
from kernels.tropical import vectors
from kernels.tropical.attention import gradients
from kernels.tropical.attention.arguments import Arguments, BlockSizes
from kernels.tropical.attention.tpu_backward import of_keys, of_queries

LANES = 128
QUERIES, KEYS = 512, 128  # of a block, where the lengths reach that far


def why_unsupported(arguments: Arguments) -> str | None:
    """The kernel has hard maxima only, float32, and head sizes whose gradients fit its memory."""
    D, Dv = arguments.q.shape[3], arguments.v.shape[3]
    if max(D, Dv) > 256:
        return f"{D=}, {Dv=}: a block's sums of more than 256 channels do not fit VMEM; take implementation='blockwise'"
    return vectors.why_not_float32(arguments.q.dtype) or vectors.why_not_hard(arguments.beta)


def pallas_tpu(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """Context c [B, T, H, Dv] float32, -inf where no key is visible, and its winners int32 (-1 there)."""
    a, how = arguments, pallas.interpret()
    mask = dataclasses.replace(a.mask, q_offset=jnp.asarray(a.mask.q_offset, jnp.int32))
    sizes = _block_sizes(a.q.shape[1], a.k.shape[1], a.block_sizes, 8 if how else LANES)
    options = Options(a.score, a.score_scale, sizes, how)
    return _attend(options, a.q, a.k, a.v, a.bias, a.slopes, mask)


@dataclass(frozen=True)
class Options:
    """What a kernel is built for."""

    score: str
    scale: float
    sizes: BlockSizes
    interpret: Any

    @property
    def lanes(self) -> int:
        """Columns of a register; few in a simulation, so that it meets several blocks soon."""
        return 8 if self.interpret else LANES

    @property
    def widest(self) -> int:
        """Most columns of a tile."""
        return 16 if self.interpret else QUERIES


def _block_sizes(T, S, given, lanes):
    """Whole registers: sizes asked for are rounded up to the lanes of one, which a simulation makes few."""
    sizes = given or BlockSizes(min(QUERIES, T), KEYS)
    return BlockSizes(*(size + -size % lanes for size in (sizes.q, sizes.k)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, bias, slopes, mask):
    c, j = _run(options, q, k, v, bias, slopes, mask)
    return _natural(c, q.shape[1], v.shape[3]), _natural(j, q.shape[1], v.shape[3])


def _forward(options, q, k, v, bias, slopes, mask):
    c, j = _run(options, q, k, v, bias, slopes, mask)
    j = _natural(j, q.shape[1], v.shape[3])
    return (_natural(c, q.shape[1], v.shape[3]), j), (q, k, v, bias, slopes, mask.q_offset, j)


def _backward(options, residuals, cotangents):
    q, k, v, bias, slopes, offset, j = residuals
    g = jnp.where(j >= 0, cotangents[0], 0)
    dq = of_queries(options, q, k, j, g)
    dk, dv = of_keys(options, q, k, j, g)
    dbias = None if bias is None else gradients.of_bias(bias, j, g)
    dslopes = None if slopes is None else gradients.of_slopes(offset, j, g)
    return dq, dk, dv, dbias, dslopes, None


_attend.defvjp(_forward, _backward)


def _natural(x, T, Dv):
    """[B, H, Dvp, Tp] -> [B, T, H, Dv]."""
    return x[:, :, :Dv, :T].transpose(0, 3, 1, 2)


def _run(options, q, k, v, bias, slopes, mask):
    """c^T and j^T [B, H, Dvp, Tp] of operands as the caller has them."""
    (B, T, H, D), (S, K, Dv), (Bq, Bk) = q.shape, v.shape[1:], dataclasses.astuple(options.sizes)
    q = vectors.pad(q.transpose(0, 2, 3, 1), 3, Bq)  # [B, H, D, Tp]
    k = vectors.pad(k.swapaxes(1, 2), 2, Bk)  # [B, K, Sp, D]
    v = vectors.pad(vectors.pad(v.transpose(0, 2, 3, 1), 3, Bk), 2, 8)  # [B, K, Dvp, Sp]
    Tp, Sp, Dvp = q.shape[3], k.shape[2], v.shape[2]
    nq, nk = Tp // Bq, Sp // Bk
    first, end = masks.key_block_range(masks.visible_blocks(mask, T, S, Bq, Bk))  # [B or 1, nq]
    first, end = (jnp.broadcast_to(x, (B, nq)).reshape(-1) for x in (first, end))
    starts = jnp.zeros((B,), jnp.int32) if mask.starts is None else mask.starts
    lengths = jnp.full((B,), S) if mask.lengths is None else jnp.minimum(mask.lengths, S)
    scalars = [first, end, *(x.reshape(-1).astype(jnp.int32) for x in (starts, lengths, mask.q_offset))]

    def key_block(b, i, n, first, end, *_):
        at = b * nq + i
        return jnp.maximum(jnp.minimum(first[at] + n, end[at] - 1), 0)

    def of_keys_block(shape, axis):
        def index(b, h, i, n, *s):
            place = [b, jax.lax.div(h, H // K), 0, 0]
            place[axis] = key_block(b, i, n, *s)
            return tuple(place)

        return pl.BlockSpec((None, None, *shape), index)

    of_rows = pl.BlockSpec((None, None, Dvp, Bq), lambda b, h, i, n, *_: (b, h, 0, i))
    operands = {"q": q, "k": k, "v": v}
    specs = {
        "q": pl.BlockSpec((None, None, D, Bq), lambda b, h, i, n, *_: (b, h, 0, i)),
        "k": of_keys_block((Bk, D), 2),
        "v": of_keys_block((Dvp, Bk), 3),
    }
    if slopes is not None:
        operands["slopes"] = slopes
        specs["slopes"] = pl.BlockSpec(memory_space=pltpu.SMEM)
    if bias is not None:
        bias = bias.swapaxes(2, 3)  # [B or 1, H or 1, S or 1, T or 1]
        full = tuple(size > 1 for size in bias.shape)
        bias = vectors.pad(bias, 3, Bq) if full[3] else bias
        operands["bias"] = vectors.pad(bias, 2, Bk) if full[2] else bias

        def bias_block(b, h, i, n, *s):
            return b * full[0], h * full[1], key_block(b, i, n, *s) * full[2], i * full[3]

        specs["bias"] = pl.BlockSpec((None, None, Bk if full[2] else 1, Bq if full[3] else 1), bias_block)
    if mask.q_segments is not None:
        operands["q_segments"] = vectors.pad(mask.q_segments.astype(jnp.int32), 1, Bq)[:, None]
        operands["kv_segments"] = vectors.pad(mask.kv_segments.astype(jnp.int32), 1, Bk)[..., None]
        specs["q_segments"] = pl.BlockSpec((None, 1, Bq), lambda b, h, i, n, *_: (b, 0, i))
        specs["kv_segments"] = pl.BlockSpec(
            (None, Bk, 1), lambda b, h, i, n, *s: (b, key_block(b, i, n, *s), 0)
        )
    kernel = partial(_kernel, options, (mask.causal, mask.window), nq, tuple(operands))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, H, nq, nk),
            in_specs=list(specs.values()),
            out_specs=[of_rows, of_rows],
            scratch_shapes=[pltpu.VMEM((Bk, Bq), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, H, Dvp, Tp), dtype) for dtype in (jnp.float32, jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(B * H * Tp * Sp * (3 * D + 4 * Dv) * (0.5 if mask.causal else 1)),
            transcendentals=0,
            bytes_accessed=4 * (q.size + nq * H // K * (k.size + v.size) + 2 * B * H * Dvp * Tp),
        ),
        interpret=options.interpret,
        name="tropical_attention_forward",
    )(*scalars, *operands.values())


def _kernel(options, causal_window, nq, names, first, end, starts, lengths, offset, *refs):
    """q [D, Bq], k [Bk, D], v [Dvp, Bk] -> c, j [Dvp, Bq]; scores [Bk, Bq] between the two halves of a step."""
    given = dict(zip(names, refs, strict=False))
    c_ref, j_ref, scores = refs[len(names) :]
    b, h, i, n = (pl.program_id(axis) for axis in range(4))
    block = first[b * nq + i] + n

    @pl.when(n == 0)
    def _start():
        c_ref[...] = jnp.full(c_ref.shape, -jnp.inf, c_ref.dtype)
        j_ref[...] = jnp.full(j_ref.shape, -1, j_ref.dtype)

    @pl.when(block < end[b * nq + i])
    def _step():
        Bk, Bq = scores.shape
        top, left = i * Bq, block * Bk
        visible = partial(_visible, given, causal_window, starts[b], lengths[b])

        def keys(r):
            s = options.scale * vectors.scores(options.score, given["q"], given["k"][r, :])
            rows = offset[0] + top + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            cols = left + r.start + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
            if "slopes" in given:
                s = s - given["slopes"][h] * (rows - cols).astype(s.dtype)
            if "bias" in given:
                s = s + (given["bias"][r, :] if given["bias"].shape[0] > 1 else given["bias"][...])
            scores[r, :] = jnp.where(visible(rows, cols, r), s, -jnp.inf)

        vectors.in_groups(Bk, keys)
        vectors.in_groups(
            c_ref.shape[0], lambda r: vectors.first_max(given["v"], scores, c_ref, j_ref, r, left)
        )


def _visible(given, causal_window, start, length, rows, cols, r):
    """`masks.visible` of one tile: positions of its queries and keys, both [R, Bq]."""
    causal, window = causal_window
    seen = (cols >= start) & (cols < length)
    if causal:
        seen &= cols <= rows
    if window is not None:
        seen &= rows - cols < window
    if "q_segments" in given:
        of_rows, of_cols = given["q_segments"][...], given["kv_segments"][r, :]
        seen &= (of_rows == of_cols) & (of_rows != 0)
    return seen
