"""Streaming attention in blocks of queries and keys, pure JAX: memory linear in T and S, with its own backward pass.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D, Dv head sizes; m one of nq blocks
of Bq rows, n one of nk blocks of Bk keys. This file lays operands out per key/value head, finds the blocks to
visit and holds the custom VJP; `blocks.py` has the loops over one head.

    q [B, K, nq, G, Bq, D]    k [B, K, nk, Bk, D]   v [B, K, nk, Bk, Dv]   lse [B, K, nq, G, Bq]
    of_rows [B, K, nq, G, Bq]   of_cols [B, K, nk, G, Bk]   extras [K, G]
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting.arguments import BlockSizes
from kernels.masks import Mask
from kernels.streaming import blocks
from kernels.streaming.arguments import Arguments, Values


def blockwise(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] in q's dtype and lse [B, T, H] in the accumulation dtype (-inf where no key is visible)."""
    (B, T, H, D), (S, K) = arguments.q.shape, arguments.k.shape[1:3]
    sizes = arguments.block_sizes or BlockSizes.choose(T, S)
    q = _pad(arguments.q, sizes.q).reshape(B, -1, sizes.q, K, H // K, D).transpose(0, 3, 1, 4, 2, 5)
    k, v = (_pad(x, sizes.k).reshape(B, -1, sizes.k, K, x.shape[-1]) for x in (arguments.k, arguments.v))
    k, v = k.transpose(0, 3, 1, 2, 4), v.transpose(0, 3, 1, 2, 4)
    values = _per_head(arguments.values, K, sizes)
    o, lse = _attend(arguments.score, q, k, v, values, _find_blocks(arguments, sizes))
    o, lse = o.transpose(0, 2, 4, 1, 3, 5), lse.transpose(0, 2, 4, 1, 3)
    return o.reshape(B, -1, H, o.shape[-1])[:, :T], lse.reshape(B, -1, H)[:, :T]


def _per_head(values, K, sizes):
    """Values laid out as the docstring of this file says."""

    def blocked(x, size):
        x = _pad(x, size)
        return x.reshape(x.shape[0], -1, size, K, x.shape[2] // K).transpose(0, 3, 1, 4, 2)

    return Values(
        tuple(blocked(x, sizes.q) for x in values.rows),
        tuple(blocked(x, sizes.k) for x in values.cols),
        tuple(x.reshape(K, -1) for x in values.extras),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visits:
    """What is integer about a call: the mask and the blocks to visit.

    keys: first and end key block per query block, int32 [B, nq, 2]; queries: the converse, int32 [B, nk, 2].
    """

    mask: Mask
    keys: jax.Array
    queries: jax.Array


def _find_blocks(arguments, sizes):
    (B, T), S, mask = arguments.q.shape[:2], arguments.k.shape[1], arguments.mask
    needed = masks.visible_blocks(mask, T, S, sizes.q, sizes.k)
    needed = jnp.broadcast_to(needed, (B, *needed.shape[1:]))
    keys, queries = masks.key_block_range(needed), masks.query_block_range(needed)
    mask = dataclasses.replace(mask, q_offset=jnp.asarray(mask.q_offset, jnp.int32))
    if S % sizes.k:  # padded keys are visible to nobody
        lengths = S if mask.lengths is None else jnp.minimum(mask.lengths, S)
        mask = dataclasses.replace(mask, lengths=jnp.broadcast_to(lengths, (B,)))
    return Visits(mask, jnp.stack(keys, -1), jnp.stack(queries, -1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(score, q, k, v, values, visits):
    return _forward(score, q, k, v, values, visits)[0]


def _forward(score, q, k, v, values, visits):
    def head(visits, values, q, k, v):
        return blocks.forward(score, visits.mask, q, k, v, values, visits.keys)

    o, lse = _map_heads(head, visits, values, q, k, v)
    return (o, lse), (q, k, v, values, visits, o, lse)


def _backward(score, residuals, cotangents):
    q, k, v, values, visits, o, lse = residuals
    do, dlse = cotangents
    # With lse = 0 in rows that saw nothing, their masked scores still give exp(-large) = 0.
    some, finite_lse = lse > -jnp.inf, jnp.where(lse > -jnp.inf, lse, 0)
    delta = (o.astype(lse.dtype) * do.astype(lse.dtype)).sum(-1) - jnp.where(some, dlse, 0)

    def head(visits, values, q, k, v, lse, delta, do):
        return blocks.backward(score, visits.mask, q, k, v, values, lse, delta, do, visits.queries)

    dq, dk, dv, dvalues = _map_heads(head, visits, values, q, k, v, finite_lse, delta, do)
    dextras = tuple(x.sum(0) for x in dvalues.extras)
    return dq, dk, dv, dataclasses.replace(dvalues, extras=dextras), None


_attend.defvjp(_forward, _backward)


def _map_heads(function, visits, values, *operands):
    """Maps function(visits of the batch row, values of the head, *operands of one head) over [B, K] operands.

    One head at a time keeps its blocks in the processor's cache and gives each batch row its own loop bounds.
    """
    B, K = operands[0].shape[:2]
    offset = visits.mask.q_offset
    by_row = dataclasses.replace(visits, mask=dataclasses.replace(visits.mask, q_offset=None))

    def head(item):
        row, of_head, (mine, *operands) = item
        visits = jax.tree.map(lambda x: x[row], by_row)
        mask = dataclasses.replace(jax.tree.map(lambda x: x[None], visits.mask), q_offset=offset)
        mine = dataclasses.replace(mine, extras=tuple(x[of_head] for x in values.extras))
        return function(dataclasses.replace(visits, mask=mask), mine, *operands)

    row, of_head = jnp.divmod(jnp.arange(B * K), K)
    heads = jax.tree.map(
        lambda x: x.reshape(B * K, *x.shape[2:]), (dataclasses.replace(values, extras=()), *operands)
    )
    mapped = jax.lax.map(head, (row, of_head, heads))
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), mapped)


def _pad(x, multiple):
    """Fills axis 1 up to a multiple by repeating the last entry, where every score is as finite as at real ones."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % multiple)
    return jnp.pad(x, padding, mode="edge")
