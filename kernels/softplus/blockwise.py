"""Softplus attention in blocks of queries and keys, pure JAX: memory linear in T, with its own backward pass.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D and Dv head sizes; m one of nq
blocks of Bq rows, n one of nk blocks of Bk keys. This file lays operands out per key/value head, finds the blocks to
visit and holds the custom VJP; `loops.py` has the loops over one head. Saved for the gradient: o and row vectors only.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting.arguments import BlockSizes
from kernels.masks import Mask
from kernels.softplus import loops
from kernels.softplus.arguments import Arguments, Rows
from kernels.softplus.loops import Head


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """What has a gradient: q [B, K, nq, G, Bq, D], k [B, K, nk, Bk, D], v [B, K, nk, Bk, Dv], gain and power [K, G]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gain: jax.Array
    power: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What has none: slopes [K, G] or None, rows [B, nq, Bq], the mask, and the blocks to visit.

    keys: first and end key block per query block, int32 [B, nq, 2]; queries: the converse, int32 [B, nk, 2].
    """

    slopes: jax.Array | None
    rows: Rows
    mask: Mask
    keys: jax.Array
    queries: jax.Array


def blockwise(arguments: Arguments) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """o [B, T, H, Dv] in q's dtype and the row statistics (Z, tau, M, W), each [B, T, H]."""
    (B, T, H, D), (S, K) = arguments.q.shape, arguments.k.shape[1:3]
    sizes = arguments.block_sizes or BlockSizes.choose(T, S)
    q = _pad(arguments.q, 1, sizes.q).reshape(B, -1, sizes.q, K, H // K, D).transpose(0, 3, 1, 4, 2, 5)
    k, v = (_pad(x, 1, sizes.k).reshape(B, -1, sizes.k, K, x.shape[-1]) for x in (arguments.k, arguments.v))
    k, v = k.transpose(0, 3, 1, 2, 4), v.transpose(0, 3, 1, 2, 4)
    gain, power, slopes = (
        x if x is None else x.reshape(K, H // K) for x in (arguments.gain, arguments.power, arguments.slopes)
    )
    context = _context(arguments, slopes, sizes)
    o, statistics = _attend(arguments.options, Operands(q, k, v, gain, power), context)
    o = o.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, H, o.shape[-1])[:, :T]
    rows = (statistics.Z, statistics.tau, statistics.M, statistics.W)
    return o, tuple(x.transpose(0, 2, 4, 1, 3).reshape(B, -1, H)[:, :T] for x in rows)


def _context(arguments, slopes, sizes) -> Context:
    (B, T), S = arguments.q.shape[:2], arguments.k.shape[1]
    needed = masks.visible_blocks(arguments.mask, T, S, sizes.q, sizes.k)
    needed = jnp.broadcast_to(needed, (B, *needed.shape[1:]))
    mask = dataclasses.replace(arguments.mask, q_offset=jnp.asarray(arguments.mask.q_offset, jnp.int32))
    if S % sizes.k:  # padded keys are visible to nobody
        lengths = S if mask.lengths is None else jnp.minimum(mask.lengths, S)
        mask = dataclasses.replace(mask, lengths=jnp.broadcast_to(lengths, (B,)))
    rows = jax.tree.map(lambda x: _pad(x, 1, sizes.q).reshape(B, -1, sizes.q), arguments.rows)
    keys, queries = masks.key_block_range(needed), masks.query_block_range(needed)
    return Context(slopes, rows, mask, jnp.stack(keys, -1), jnp.stack(queries, -1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, operands, context):
    return _forward(options, operands, context)[0]


def _forward(options, operands, context):
    result = _map_heads(lambda head, keys, _: loops.forward(options, head, keys), operands, context)
    return result, (operands, context, *result)


def _backward(options, residuals, cotangents):
    operands, context, o, statistics = residuals
    do = cotangents[0]  # the statistics have no gradient
    wide = statistics.Z.dtype
    delta = (o.astype(wide) * do.astype(wide)).sum(-1)

    def head(head, keys, queries, statistics, delta, do):
        return loops.backward(options, head, statistics, delta, do, keys, queries)

    dq, dk, dv, dgain, dpower = _map_heads(head, operands, context, statistics, delta, do)
    return Operands(dq, dk, dv, dgain.sum(0), dpower if dpower is None else dpower.sum(0)), None


_attend.defvjp(_forward, _backward)


def _map_heads(function, operands: Operands, context: Context, *others):
    """Maps function(head, keys, queries, *others) over batch and key/value heads; others are [B, K, ...].

    One head at a time keeps its blocks in the processor's cache and gives each batch row its own loop bounds.
    """
    B, K = operands.q.shape[:2]
    offset = context.mask.q_offset
    of_batch = (context.rows, dataclasses.replace(context.mask, q_offset=None), context.keys, context.queries)
    of_head = (operands.gain, operands.power, context.slopes)

    def one(item):
        b, h, q, k, v, others = item
        rows, mask, keys, queries = jax.tree.map(lambda x: x[b], of_batch)
        mask = dataclasses.replace(jax.tree.map(lambda x: x[None], mask), q_offset=offset)
        gain, power, slopes = jax.tree.map(lambda x: x[h], of_head)
        return function(Head(q, k, v, gain, power, slopes, rows, mask), keys, queries, *others)

    heads = jax.tree.map(
        lambda x: x.reshape(B * K, *x.shape[2:]), (operands.q, operands.k, operands.v, others)
    )
    mapped = jax.lax.map(one, (jnp.repeat(jnp.arange(B), K), jnp.tile(jnp.arange(K), B), *heads))
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), mapped)


def _pad(x, axis, multiple):
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding)
