"""What decays take on the way from one position to another: exponentials of sums of logarithms, outside the scans.

Letters: B batch, T queries, S keys, K key/value heads, X channels (1, D or Dv); log_decay [B, S, K, X], <= 0; t a query
that reads the state as of key r_t (rows [T]; -1 before the first key), s a key.

    at the query from a state before key 0:  exp(sum over l <= r_t)         `to_rows`
    behind the last key from key s:          exp(sum over l > s)            `to_end`
    at the query from key s:                 exp(sum over s < l <= r_t)     `between`

Sums of sums are never subtracted: no digit is lost however strong a decay, and a gradient that should be 0 is 0.
"""

import jax
import jax.numpy as jnp
from jax import lax


def rows_of(q_offset, T: int, S: int) -> jax.Array:
    """The last key that is not after each query, int32 [T], or -1."""
    return jnp.clip(q_offset + jnp.arange(T), -1, S - 1)


def to_rows(log_decay: jax.Array, rows: jax.Array) -> jax.Array:
    """[B, T, K, X]."""
    return jnp.exp(_at(lax.cumsum(log_decay, axis=1), rows, axis=1))


def to_end(log_decay: jax.Array) -> jax.Array:
    """[B, S, K, X]."""
    later = jnp.pad(log_decay[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    return jnp.exp(lax.cumsum(later, axis=1, reverse=True))


def through(log_decay: jax.Array) -> jax.Array:
    """[B, K, X]: from before the first key to behind the last."""
    return jnp.exp(log_decay.sum(1))


def between(log_decay: jax.Array, rows: jax.Array) -> jax.Array:
    """[B, T, S, K, X]; 1 where s >= r_t. Dense, for the reference."""
    keys = jnp.arange(log_decay.shape[1])
    later = (keys[:, None] > keys)[None, :, :, None, None]  # [l, s]: l > s
    return jnp.exp(_at(lax.cumsum(jnp.where(later, log_decay[:, :, None], 0), axis=1), rows, axis=1))


def _at(sums, rows, axis):
    """Entries `rows` of an axis, 0 at row -1."""
    at = jnp.take(sums, jnp.maximum(rows, 0), axis=axis)
    shape = [1] * sums.ndim
    shape[axis] = len(rows)
    return jnp.where((rows >= 0).reshape(shape), at, 0)
