"""Tropical attention with every maximum smoothed, in blocks: max becomes (1 / beta) log sum exp(beta .).

Letters: see the package. Gradients are those of the loop itself; its blocks are computed again in the backward pass,
so memory stays linear in T and S.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.tropical.attention.arguments import Arguments
from kernels.tropical.attention.reference import reference, smooth_max

BLOCK = 32  # of queries and of keys; a block holds BLOCK x BLOCK x D numbers a head


def smooth(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """Context c [B, T, H, Dv], -inf where no key is visible, and -1 for the winners, of which there are none."""
    a = arguments
    T, S = a.q.shape[1], a.k.shape[1]
    Bq, Bk = min(T, BLOCK), min(S, BLOCK)
    padded = _pad_keys(a, S + -S % Bk)

    @jax.checkpoint
    def query_block(top):
        rows = _rows(padded, top, Bq)

        @jax.checkpoint
        def key_block(c, left):
            more, _ = reference(_keys(rows, left, Bk))
            return smooth_max(jnp.stack([c, more]), a.beta, axis=0), None

        start = jnp.full((*rows.q.shape[:3], a.v.shape[3]), -jnp.inf, a.q.dtype)
        return jax.lax.scan(key_block, start, jnp.arange(0, S, Bk))[0]

    c = jax.lax.map(query_block, jnp.arange(0, T, Bq))  # [nq, B, Bq, H, Dv]
    c = c.swapaxes(0, 1).reshape(a.q.shape[0], -1, *c.shape[3:])[:, :T]
    return c, jnp.full(c.shape, -1, jnp.int32)


def _pad_keys(a, length):
    B, T, S = a.q.shape[0], a.q.shape[1], a.k.shape[1]
    Bq = min(T, BLOCK)
    lengths = S if a.mask.lengths is None else jnp.minimum(a.mask.lengths, S)
    mask = dataclasses.replace(a.mask, lengths=jnp.broadcast_to(lengths, (B,)))
    bias = a.bias
    if bias is not None:
        bias = bias if bias.shape[2] == 1 else _pad(bias, 2, T + -T % Bq)
        bias = bias if bias.shape[3] == 1 else _pad(bias, 3, length)
    if mask.q_segments is not None:
        mask = dataclasses.replace(
            mask,
            q_segments=_pad(mask.q_segments, 1, T + -T % Bq),
            kv_segments=_pad(mask.kv_segments, 1, length),
        )
    q, k, v = _pad(a.q, 1, T + -T % Bq), _pad(a.k, 1, length), _pad(a.v, 1, length)
    return dataclasses.replace(a, q=q, k=k, v=v, bias=bias, mask=mask)


def _rows(a, top, count):
    """The same call for query rows top .. top + count - 1."""
    mask = dataclasses.replace(a.mask, q_offset=a.mask.q_offset + top)
    if mask.q_segments is not None:
        mask = dataclasses.replace(mask, q_segments=_slice(mask.q_segments, top, count, 1))
    bias = a.bias if a.bias is None or a.bias.shape[2] == 1 else _slice(a.bias, top, count, 2)
    return dataclasses.replace(a, q=_slice(a.q, top, count, 1), bias=bias, mask=mask)


def _keys(a, left, count):
    """The same call for keys left .. left + count - 1, whose numbering starts at 0 again."""
    mask = dataclasses.replace(a.mask, q_offset=a.mask.q_offset - left, lengths=a.mask.lengths - left)
    if mask.starts is not None:
        mask = dataclasses.replace(mask, starts=mask.starts - left)
    if mask.q_segments is not None:
        mask = dataclasses.replace(mask, kv_segments=_slice(mask.kv_segments, left, count, 1))
    bias = a.bias if a.bias is None or a.bias.shape[3] == 1 else _slice(a.bias, left, count, 3)
    k, v = _slice(a.k, left, count, 1), _slice(a.v, left, count, 1)
    return dataclasses.replace(a, k=k, v=v, bias=bias, mask=mask)


def _slice(x, start, size, axis):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _pad(x, axis, length):
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, padding)
