"""Tropical attention in blocks of queries and keys: memory linear in T and S, with its own backward pass.

Letters: see the package; N the (batch, head) pairs of one group, worked on together; Bq, Bk block sizes. No rescaling
is needed: a maximum is exact, so block sizes do not change a bit of the result.

    per query block:  S = min_d (q - k) - max_d (q - k);   (c, j) = first max over keys of S + v
The winners j are all the backward pass needs; see `gradients.py`.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.tropical import tiles
from kernels.tropical.attention import gradients
from kernels.tropical.attention.arguments import TILE, Arguments, BlockSizes
from kernels.tropical.attention.smooth import smooth


def blockwise(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """Context c [B, T, H, Dv], -inf where no key is visible, and its winners int32 (-1 there; all -1 when smooth)."""
    if arguments.beta is not None:
        return smooth(arguments)
    a = arguments
    mask = dataclasses.replace(a.mask, q_offset=jnp.asarray(a.mask.q_offset, jnp.int32))
    sizes = a.block_sizes or BlockSizes.choose(a.q.shape[1], a.k.shape[1])
    return _attend(_Options(a.score, a.score_scale, sizes), a.q, a.k, a.v, a.bias, a.slopes, mask)


@dataclass(frozen=True)
class _Options:
    score: str
    scale: float
    sizes: BlockSizes


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, bias, slopes, mask):
    (B, T, H, _), (S, K, Dv), sizes = q.shape, v.shape[1:], options.sizes
    blocks = masks.visible_blocks(mask, T, S, sizes.q, sizes.k)
    bounds = jnp.stack(masks.key_block_range(blocks), -1)  # [B or 1, nq, 2]
    bounds = jnp.broadcast_to(bounds, (B, *bounds.shape[1:]))
    if S % sizes.k:  # padded keys are visible to nobody
        lengths = S if mask.lengths is None else jnp.minimum(mask.lengths, S)
        mask = dataclasses.replace(mask, lengths=jnp.broadcast_to(lengths, (B,)))
    q = _pad(q.transpose(0, 2, 3, 1), 3, sizes.q)  # [B, H, D, Tp]
    k = _pad(k.transpose(0, 2, 3, 1), 3, sizes.k)  # [B, K, D, Sp]
    v = _pad(v.transpose(0, 2, 1, 3), 2, sizes.k)  # [B, K, Sp, Dv]
    if bias is not None:
        bias = bias if bias.shape[2] == 1 else _pad(bias, 2, sizes.q)
        bias = bias if bias.shape[3] == 1 else _pad(bias, 3, sizes.k)

    def group(items):
        b, h = items // H, items % H
        own_bias = None if bias is None else bias[b % bias.shape[0], h % bias.shape[1]]
        own_slopes = None if slopes is None else slopes[h]
        operands = q[b, h], k[b, h * K // H], v[b, h * K // H], own_bias, own_slopes
        rows = jax.tree.map(lambda x: x[b], dataclasses.replace(mask, q_offset=None))
        return _group(options, *operands, dataclasses.replace(rows, q_offset=mask.q_offset), bounds[b])

    groups = -(-B * H * sizes.q * sizes.k // TILE)
    size = -(-B * H // min(groups, B * H))
    items = jnp.minimum(jnp.arange(-(-B * H // size) * size), B * H - 1).reshape(-1, size)
    c, j = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: B * H], jax.lax.map(group, items))
    return tuple(x.reshape(B, H, -1, Dv)[:, :, :T].swapaxes(1, 2) for x in (c, j))


def _group(options, q, k, v, bias, slopes, mask, bounds):
    """q [N, D, Tp], k [N, D, Sp], v [N, Sp, Dv], bias [N, Tp or 1, Sp or 1], slopes [N], bounds [N, nq, 2]."""
    sizes = options.sizes
    visits = bounds[..., 1] > bounds[..., 0]
    first = jnp.where(visits, bounds[..., 0], bounds.max()).min(0)
    end = bounds[..., 1].max(0)

    def query_block(block):
        top = block * sizes.q
        q_block = jax.lax.dynamic_slice_in_dim(q, top, sizes.q, axis=2)

        def key_block(n, carry):
            left = n * sizes.k
            k_block = jax.lax.dynamic_slice_in_dim(k, left, sizes.k, axis=2)
            v_block = jax.lax.dynamic_slice_in_dim(v, left, sizes.k, axis=1)
            s = options.scale * _scores(options.score, q_block, k_block)
            s = _visible(s, bias, slopes, mask, top + jnp.arange(sizes.q), left + jnp.arange(sizes.k))
            return tiles.product(s, v_block, carry, left)

        start = tiles.nothing((q.shape[0], sizes.q, v.shape[2]), q.dtype)
        return jax.lax.fori_loop(first[block], end[block], key_block, start)

    c, j = jax.lax.map(query_block, jnp.arange(q.shape[2] // sizes.q))  # [nq, N, Bq, Dv]
    return tuple(x.swapaxes(0, 1).reshape(q.shape[0], -1, v.shape[2]) for x in (c, j))


def _scores(score, q, k):
    """Raw scores of q [N, D, Bq] and k [N, D, Bk], transposed: [N, Bk, Bq]."""
    D = q.shape[1]
    shape = (q.shape[0], k.shape[2], q.shape[2])
    low, high = jnp.full(shape, jnp.inf, q.dtype), jnp.full(shape, -jnp.inf, q.dtype)
    if score == "maxplus_dot":
        return tiles.fold(D, lambda d, c: jnp.maximum(c, tiles.row(q, d) + tiles.column(k, d)), high)

    def step(d, carry):
        difference = tiles.row(q, d) - tiles.column(k, d)
        return jnp.minimum(carry[0], difference), jnp.maximum(carry[1], difference)

    low, high = tiles.fold(D, step, (low, high))
    if score == "hilbert":
        return low - high
    return D * low - (q.sum(1)[:, None, :] - k.sum(1)[:, :, None])  # hilbert_asym


def _visible(s, bias, slopes, mask, rows, keys):
    """Add slope and bias to scores [N, Bk, Bq], and -inf where a key is invisible."""
    if slopes is not None:
        s = s - slopes[:, None, None] * (mask.q_offset + rows - keys[:, None])
    if bias is not None:
        for axis, index in ((1, rows), (2, keys)):
            bias = (
                bias
                if bias.shape[axis] == 1
                else jax.lax.dynamic_slice_in_dim(bias, index[0], len(index), axis)
            )
        s = s + bias.swapaxes(1, 2)
    return jnp.where(masks.visible(mask, rows, keys).swapaxes(1, 2), s, -jnp.inf)


def _forward(options, *operands):
    c, j = _attend(options, *operands)
    return (c, j), (operands, j)


def _backward(options, residuals, cotangents):
    (q, k, v, bias, slopes, mask), j = residuals
    g = jnp.where(j >= 0, cotangents[0], 0)
    dq, dk, dv = gradients.of_operands(options.score, options.scale, q, k, v, j, g)
    dbias = None if bias is None else gradients.of_bias(bias, j, g)
    dslopes = None if slopes is None else gradients.of_slopes(mask.q_offset, j, g)
    return dq, dk, dv, dbias, dslopes, None


_attend.defvjp(_forward, _backward)


def _pad(x, axis, multiple):
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding)
