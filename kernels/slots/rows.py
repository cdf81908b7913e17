"""Which token enters the slots with each row, and where the state starts anew: integers only, for the blockwise form.

Letters: B batch, T rows (queries), S keys, n slot shift; row t stands at position a = q_offset + t and the key
e = a - n enters with it. Documents are numbered from 1; 0 is padding, which writes nothing and resets nothing.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels.slots.arguments import Arguments


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """bool [B, T] each: the row is no padding; its key e enters the slots; the state restarts before it; slots show."""

    real: jax.Array
    enters: jax.Array
    begins: jax.Array
    shown: jax.Array
    written: jax.Array  # whether anything is in the slots after the row


def find_rows(arguments: Arguments) -> Rows:
    """The rows of a call."""
    mask, (B, T), S = arguments.mask, arguments.q.shape[:2], arguments.k.shape[1]
    row = jnp.ones((B, T), jnp.int32) if mask.q_segments is None else mask.q_segments
    key = jnp.ones((B, S), jnp.int32) if mask.kv_segments is None else mask.kv_segments
    positions, columns = mask.q_offset + jnp.arange(T), jnp.arange(S)
    if mask.starts is not None:
        row = jnp.where(positions >= mask.starts[:, None], row, 0)
        key = jnp.where(columns >= mask.starts[:, None], key, 0)
    if mask.lengths is not None:
        key = jnp.where(columns < mask.lengths[:, None], key, 0)
    document = _last_real(row)
    before = jnp.pad(document[:, :-1], ((0, 0), (1, 0)))
    begins = (before != 0) & (document != before)
    enters = (document != 0) & (delay(key, arguments) == document)
    written = _written(arguments, enters, begins)
    real = row != 0
    return Rows(real, enters, begins, real & written if arguments.empty_slots == "mask" else real, written)


def delay(x: jax.Array, arguments: Arguments) -> jax.Array:
    """Rows of x [B, S, ...] that enter the slots: x at e = q_offset + t - n for t = 0..T-1, zero where e < 0."""
    T, S, offset = arguments.q.shape[1], x.shape[1], arguments.mask.q_offset
    n = min(arguments.shift, S)  # a larger shift lets nothing enter either
    end = max(0, offset + T - n - S) if isinstance(offset, int) else T
    padded = jnp.pad(x, [(0, 0), (n, end)] + [(0, 0)] * (x.ndim - 2))
    return jax.lax.dynamic_slice_in_dim(padded, offset, T, axis=1)


def _last_real(row):
    """The number of the last row up to here that is no padding, 0 before the first."""
    at = jax.lax.cummax(jnp.where(row != 0, jnp.arange(row.shape[1]), -1), axis=1)
    return jnp.where(at >= 0, jnp.take_along_axis(row, jnp.maximum(at, 0), axis=1), 0)


def _written(arguments, enters, begins):
    """Whether a token entered since the document began; before the first beginning also what the state brings."""
    count = jnp.cumsum(enters, axis=1, dtype=jnp.int32)
    at_begin = jax.lax.cummax(jnp.where(begins, count - enters, 0), axis=1)
    brought = arguments.state.written[:, None]
    if arguments.document_state == "zero":
        brought = brought & (jnp.cumsum(begins, axis=1) == 0)
    return (count > at_begin) | brought
