"""The weights of one chunk of one head, on values in registers: what the TPU and the GPU kernel share.

Letters: C positions of a chunk, Dv value size; i a row and j a key of the chunk. Rows are [C, 1], keys [1, C], and the
function `turn` takes one into the other. The equations and their names are those of `blockwise.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Runs(NamedTuple):
    """bool: key j is visible to row i [C, C]; which rows, and keys, are of the state's document, None for all.

    `carried` [C, 1] are the rows of the document that the state before the chunk belongs to, `start` [C, 1] those of
    the chunk's first document, `end` [1, C] the keys of its last one.
    """

    visible: jax.Array
    carried: jax.Array | None = None
    start: jax.Array | None = None
    end: jax.Array | None = None


def triangle(C: int) -> jax.Array:
    """Keys j <= i, bool [C, C]."""
    return jax.lax.broadcasted_iota(jnp.int32, (C, C), 0) >= jax.lax.broadcasted_iota(jnp.int32, (C, C), 1)


def only(condition: jax.Array | None, x: jax.Array) -> jax.Array:
    """x where the condition holds, else -inf."""
    return x if condition is None else jnp.where(condition, x, -jnp.inf)


def exp_below(a: jax.Array, b: jax.Array) -> jax.Array:
    """e^(a - b) for a <= b, 0 where a is -inf."""
    return jnp.exp(a - jnp.where(b > -jnp.inf, b, 0))


def read(dot: Callable, s, v, runs: Runs, m, z, n):
    """Rows of a chunk: o [C, Dv], M and z [C, 1]. s [1, C], v [C, Dv]; before it m, z [1, 1], n [1, Dv], all float32
    but v, whose dtype the weights take in the product."""
    seen, before = only(runs.visible, s), only(runs.carried, m)
    M = jnp.maximum(seen.max(1, keepdims=True), before)
    w, a = exp_below(seen, M), exp_below(before, M)
    z = a * z + w.sum(1, keepdims=True)
    n = a * n + dot(w.astype(v.dtype), v, ((1,), (0,)))
    return n / jnp.where(z > 0, z, 1), M, z


def pull(dot: Callable, turn: Callable, s, v, runs: Runs, M, z, delta, do, last, G, R):
    """Gradients of a chunk's keys: ds [1, C], dv [C, Dv], float32.

    M, z, delta [C, 1]; do [C, Dv] of v's dtype; last [1, 1] is M of the last row, to which the sums G [1, Dv] and
    R [1, 1] over later rows are scaled.
    """
    p = exp_below(only(runs.visible, s), M) / jnp.where(z > 0, z, 1)
    e = exp_below(only(runs.end, s), last)
    dv = dot(p.astype(v.dtype), do, ((0,), (0,))) + turn(e) * G
    ds = (p * (dot(do, v, ((1,), (1,))) - delta)).sum(0, keepdims=True)
    later = turn((v.astype(jnp.float32) * G).sum(1, keepdims=True))
    return ds + e * (later - R), dv
