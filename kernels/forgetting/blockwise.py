"""Forgetting attention in blocks of queries and keys, pure JAX: memory linear in T, with its own backward pass.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D and Dv head sizes; m one of nq
blocks of Bq rows, n one of nk blocks of Bk keys. This file lays operands out per key/value head, finds the blocks to
visit and holds the custom VJP; `blocks.py` has the loops over one head.

    q [B, K, nq, G, Bq, D]   k [B, K, nk, Bk, D]   v [B, K, nk, Bk, Dv]   log_f [B, K, G, nk Bk]   lse [B, K, nq, G, Bq]
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting import blocks, decay, pruning
from kernels.forgetting.arguments import Arguments
from kernels.masks import Mask


def blockwise(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] in q's dtype and lse [B, T, H] in the accumulation dtype (-inf where no key is visible)."""
    (B, T, H, _), K, sizes = arguments.q.shape, arguments.k.shape[2], arguments.block_sizes
    q = _pad(arguments.q, 1, sizes.q).reshape(B, -1, sizes.q, K, H // K, arguments.q.shape[-1])
    q = q.transpose(0, 3, 1, 4, 2, 5)
    k, v = (_pad(x, 1, sizes.k).reshape(B, -1, sizes.k, K, x.shape[-1]) for x in (arguments.k, arguments.v))
    k, v = k.transpose(0, 3, 1, 2, 4), v.transpose(0, 3, 1, 2, 4)
    log_f = arguments.log_f
    if log_f is not None:
        log_f = _pad(log_f, 1, sizes.k).reshape(B, -1, K, H // K).transpose(0, 2, 3, 1)
    options = blocks.Options(arguments.scale, arguments.decay_mode)
    o, lse = _attend(options, q, k, v, log_f, _find_blocks(arguments))
    o, lse = o.transpose(0, 2, 4, 1, 3, 5), lse.transpose(0, 2, 4, 1, 3)
    return o.reshape(B, -1, H, o.shape[-1])[:, :T], lse.reshape(B, -1, H)[:, :T]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visits:
    """What is integer about a call: the mask, the blocks to visit and the runs of gates.

    keys: first and end key block per query block, int32 [B, K, nq, 2]; queries: the converse, int32 [B, K, nk, 2];
    starts: first key block kept by pruning per query head, int32 [B, K, nq, G], or None;
    runs: int32 [B, nk Bk], see `decay.gate_gradient`, or None.
    """

    mask: Mask
    keys: jax.Array
    queries: jax.Array
    starts: jax.Array | None
    runs: jax.Array | None


def _find_blocks(arguments):
    (B, T, H, _), (S, K), sizes = arguments.q.shape, arguments.k.shape[1:3], arguments.block_sizes
    mask = arguments.mask
    needed = masks.visible_blocks(mask, T, S, sizes.q, sizes.k)[:, None]
    starts = runs = None
    if arguments.threshold is not None:
        starts = arguments.acp_start().reshape(B, K, H // K, -1)
        needed = needed & pruning.kept_blocks(starts, needed.shape[-1]).any(2)
        starts = starts.swapaxes(2, 3)
    if arguments.log_f is not None and mask.kv_segments is not None:
        runs = jnp.cumsum(masks.unread_gates(mask, T, S), axis=1, dtype=jnp.int32)
        runs = jnp.pad(runs, ((0, 0), (0, -S % sizes.k)), mode="edge")
    mask = dataclasses.replace(mask, q_offset=jnp.asarray(mask.q_offset, jnp.int32))
    if S % sizes.k:  # padded keys are visible to nobody
        lengths = S if mask.lengths is None else jnp.minimum(mask.lengths, S)
        mask = dataclasses.replace(mask, lengths=jnp.broadcast_to(lengths, (B,)))
    needed = jnp.broadcast_to(needed, (B, K, *needed.shape[2:]))
    keys, queries = masks.key_block_range(needed), masks.query_block_range(needed)
    return Visits(mask, jnp.stack(keys, -1), jnp.stack(queries, -1), starts, runs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, log_f, visits):
    return _forward(options, q, k, v, log_f, visits)[0]


def _forward(options, q, k, v, log_f, visits):
    def head(mask, _, q, k, v, log_f, keys, starts):
        return blocks.forward(options, mask, q, k, v, log_f, keys, starts)

    o, lse = _map_heads(head, visits, q, k, v, log_f, visits.keys, visits.starts)
    return (o, lse), (q, k, v, log_f, visits, o, lse)


def _backward(options, residuals, cotangents):
    q, k, v, log_f, visits, o, lse = residuals
    do, dlse = cotangents
    # With lse = 0 in rows that saw nothing, their masked scores still give exp(-large) = 0.
    some, finite_lse = lse > -jnp.inf, jnp.where(lse > -jnp.inf, lse, 0)
    dlse = jnp.where(some, dlse, 0)
    delta = (o.astype(lse.dtype) * do.astype(lse.dtype)).sum(-1) - dlse

    def head(mask, runs, q, k, v, log_f, lse, delta, do, dlse, queries, starts):
        dq, dk, dv, column = blocks.backward(options, mask, q, k, v, log_f, lse, delta, do, queries, starts)
        if log_f is None:
            return dq, dk, dv, None
        return dq, dk, dv, decay.gate_gradient(_row_terms(dlse, mask.q_offset, -column), runs)

    dq, dk, dv, dlog_f = _map_heads(
        head, visits, q, k, v, log_f, finite_lse, delta, do, dlse, visits.queries, visits.starts)  # fmt: skip
    return dq, dk, dv, dlog_f, None


_attend.defvjp(_forward, _backward)


def _row_terms(dlse, q_offset, dc):
    """Adds each row's own share of dc: the sum of dS over a row is exactly dlse, [nq, G, Bq] onto [G, S].

    Rows past the last key (keys in pieces) have read the gates up to it.
    """
    rows, S = dlse.swapaxes(0, 1).reshape(dlse.shape[1], -1), dc.shape[1]
    positions = q_offset + jnp.arange(rows.shape[1])
    positions = jnp.where(positions < 0, S, jnp.minimum(positions, S - 1))
    return dc.at[:, positions].add(rows, mode="drop")


def _map_heads(function, visits, *operands):
    """Maps function(mask, runs, *operands of one head) over [B, K] operands; mask and runs are those of a batch row.

    One head at a time keeps its blocks in the processor's cache and gives each head its own loop bounds.
    """
    B, K = operands[0].shape[:2]
    offset, rows = visits.mask.q_offset, (dataclasses.replace(visits.mask, q_offset=None), visits.runs)

    def head(item):
        row, heads = item
        mask, runs = jax.tree.map(lambda x: x[row], rows)
        mask = dataclasses.replace(jax.tree.map(lambda x: x[None], mask), q_offset=offset)
        return function(mask, runs, *heads)

    heads = jax.tree.map(lambda x: x.reshape(B * K, *x.shape[2:]), operands)
    mapped = jax.lax.map(head, (jnp.repeat(jnp.arange(B), K), heads))
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), mapped)


def _pad(x, axis, multiple):
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding)
