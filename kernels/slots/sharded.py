"""Slot attention with time split over devices: carried slots and a halo of keys. See `kernels.sequence`.

Letters: B batch, T rows and keys of a shard, h of the halo, K key/value heads, M slots, n slot shift, W window. A
device takes the h = max(W - 1, n) keys to its left, whose last ones its window sees and whose others enter its slots.
A shard multiplies a state by its gates, or drops it where another document begins, and adds what enters:

    K <- exp(sum of g) K [no document began] + sum_t exp(sum of g after t) (1 - exp(g_t)) k_t^T       V alike
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kernels import sequence
from kernels.sequence import Axis, Exchange
from kernels.slots.arguments import Arguments, ChunkSizes, SlotState
from kernels.slots.rows import delay, find_rows


def carried(operation, arguments: Arguments, axis: Axis):
    """o, both lse of this device's rows, and the state after the last row of all."""
    local, filled, dropped = _with_halo(arguments, axis)
    state = sequence.exclusive(_own(local, dropped), arguments.state, _combine, axis)
    key, value = (jnp.where(dropped[:, None, None, None], 0, x) for x in (state.key, state.value))
    state = SlotState(key, value, state.written & ~dropped)
    o, lse_slots, lse_window, state = operation(dataclasses.replace(local, state=state))
    hidden = filled[..., None]
    lse_slots, lse_window = (jnp.where(hidden, -jnp.inf, x) for x in (lse_slots, lse_window))
    return jnp.where(hidden[..., None], 0, o), lse_slots, lse_window, sequence.last(state, axis)


def _with_halo(a, axis):
    """(arguments with the keys to the left, rows [B, T] filled in, rows [B] whose first document is a new one).

    Padding at the beginning of a shard counts as rows of the document before it, whose last tokens may still enter
    the slots; the results of such rows are no one's.
    """
    B, T = a.q.shape[:2]
    halo = min(max(a.window - 1, a.shift), (axis.size - 1) * T)
    names = ("k", "v", "k_window", "log_gates")
    keys, segments = {name: getattr(a, name) for name in names}, a.mask.kv_segments
    if halo:
        keys, segments = jax.tree.map(
            lambda x: jnp.concatenate([sequence.from_left(x, axis, halo), x], axis=1), (keys, segments)
        )
    first = halo - axis.index * T  # where the very first key stands among the keys here
    bounds = {name: getattr(a.mask, name) for name in ("starts", "lengths")}
    bounds = {n: None if x is None else jnp.clip(x + first, 0, halo + T) for n, x in bounds.items()}
    filled, dropped, rows = jnp.zeros((B, T), bool), jnp.zeros(B, bool), a.mask.q_segments
    if rows is not None:
        rows, filled, dropped = _continued(_visible_rows(a.mask, axis, T), axis)
    elif halo:
        bounds["starts"] = jnp.maximum(
            0 if bounds["starts"] is None else bounds["starts"], jnp.full((B,), first)
        )
    mask = dataclasses.replace(a.mask, q_offset=halo, q_segments=rows, kv_segments=segments, **bounds)
    sizes = a.chunk_sizes if a.chunk_sizes is None or a.chunk_sizes.chunk <= T else ChunkSizes.choose(T)
    local = dataclasses.replace(a, **keys, mask=mask, chunk_sizes=sizes, document_state="zero")
    return local, filled, dropped


def _visible_rows(mask, axis, T):
    """Documents of the rows, 0 also for left padding."""
    if mask.starts is None:
        return mask.q_segments
    return jnp.where(axis.index * T + jnp.arange(T) >= mask.starts[:, None], mask.q_segments, 0)


def _continued(rows, axis):
    """Rows [B, T] with padding at their beginning counted to the document before, where, and whether a new one begins.

    A row's document is the last one up to it that is not 0, over all shards.
    """
    at = jnp.where(rows != 0, jnp.arange(rows.shape[1]), -1).max(1)
    end = jnp.where(at < 0, 0, jnp.take_along_axis(rows, jnp.maximum(at, 0)[:, None], axis=1)[:, 0])
    before = sequence.exclusive(
        end, jnp.zeros_like(end), lambda old, new: jnp.where(new != 0, new, old), axis
    )
    filled = (lax.cummax(rows, axis=1) == 0) & (before[:, None] != 0)
    rows = jnp.where(filled, before[:, None], rows)
    return rows, filled, (before != 0) & (rows[:, 0] != before)


def _own(local, dropped):
    """What the shard does to a state: a factor [B, K, M], what it adds, and what becomes of `written`."""
    rows = find_rows(local)
    k, v, gates = (delay(x, local).astype(local.accumulator) for x in (local.k, local.v, local.log_gates))
    gates = jnp.where(rows.enters[:, :, None, None], gates, 0)
    run = jnp.cumsum(rows.begins, axis=1)
    live = run == run[:, -1:]
    later = jnp.pad(gates[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    weight = -jnp.expm1(gates) * jnp.exp(lax.cumsum(later, axis=1, reverse=True))
    weight = jnp.where(live[:, :, None, None], weight, 0)
    key, value = (jnp.einsum("btkm,btkd->bkmd", weight, x, precision="highest") for x in (k, v))
    anew = dropped | (run[:, -1] > 0)
    factor = jnp.where(anew[:, None, None], 0, jnp.exp(gates.sum(1)))
    return SlotState(key, value, (rows.enters & live).any(1)), factor, anew


def _combine(state, shard):
    own, factor, anew = shard
    key, value = (factor[..., None] * x + y for x, y in ((state.key, own.key), (state.value, own.value)))
    return SlotState(key, value, (state.written & ~anew) | own.written)


def _fits(arguments, size):
    """A document that begins anew from the initial state would need that state on every device."""
    anew = arguments.mask.q_segments is not None and arguments.document_state != "zero"
    T, S = arguments.q.shape[1], arguments.k.shape[1]
    return sequence.own_sequence(arguments.mask, T, S) and not anew


EXCHANGES = (Exchange(carried, _fits),)
