"""n_i, the number of keys each query row sees, exactly and in memory O(T + S).

Letters: B batch, T queries, S keys; i a query row at position a_i = q_offset + i, j a key. Without segments a row sees
an interval of keys, lo_i <= j <= hi_i. With segments it sees those of the interval that carry its own number: keys
sorted by segment (stably, so by position within a segment) make them a run, found by bisection.
"""

import math

import jax
import jax.numpy as jnp

from kernels.masks import Mask


def visible_counts(mask: Mask, T: int, S: int) -> jax.Array:
    """n_i of every query row, int32 [B or 1, T]; the same as `masks.dense(mask, T, S).sum(-1)`."""
    low, high = interval(mask, T, S)
    if mask.q_segments is None:
        return jnp.maximum(high - low + 1, 0)
    low, high = (jnp.broadcast_to(x, mask.q_segments.shape) for x in (low, high))
    upto = jax.vmap(_count_upto)
    order = jnp.argsort(mask.kv_segments, axis=1, stable=True).astype(jnp.int32)
    count = upto(order, mask.kv_segments, mask.q_segments, high) - upto(
        order, mask.kv_segments, mask.q_segments, low - 1
    )
    return jnp.where(mask.q_segments != 0, jnp.maximum(count, 0), 0)


def interval(mask, T, S):
    """First and last key by every condition but the segments, two int32 [B or 1, T]; last < first where none."""
    at = (mask.q_offset + jnp.arange(T, dtype=jnp.int32))[None]
    high = jnp.minimum(at, S - 1) if mask.causal else jnp.full_like(at, S - 1)
    low = jnp.zeros_like(at) if mask.window is None else jnp.maximum(at - mask.window + 1, 0)
    if mask.starts is not None:
        low = jnp.maximum(low, mask.starts[:, None])
    if mask.lengths is not None:
        high = jnp.minimum(high, mask.lengths[:, None] - 1)
    return jnp.broadcast_arrays(low.astype(jnp.int32), high.astype(jnp.int32))


def _count_upto(order, kv_segments, segment, last):
    """Keys j <= last [T] whose segment is `segment` [T], for one batch row; `order` [S] sorts its keys."""
    ranked = kv_segments[order]
    first, end = (
        jnp.searchsorted(ranked, segment, side=side).astype(jnp.int32) for side in ("left", "right")
    )

    def halve(_, bounds):
        below, above = bounds  # keys of the run before `below` are <= last, those from `above` on are not
        middle = (below + above) // 2
        inside = (below < above) & (order[jnp.minimum(middle, order.shape[0] - 1)] <= last)
        return jnp.where(inside, middle + 1, below), jnp.where(inside, above, jnp.minimum(middle, above))

    steps = math.ceil(math.log2(order.shape[0] + 1)) + 1
    return jax.lax.fori_loop(0, steps, halve, (first, end))[0] - first
