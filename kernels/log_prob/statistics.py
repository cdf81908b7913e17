"""Running statistics of rows of logits: extended by a block, joined, and brought to log-probability and entropy.

    m' = max(m, max x)      a = e^(m - m')      s' = a s + sum e^(x - m')
    u' = a (u + (m - m') s) + sum e^(x - m') (x - m')
    lse = m + log s         logp = y - lse      H = log s - u / s

u is relative to m: with sum p x instead, H of a peaked row would be a difference of two large numbers.
Letters: x a block of logits, `axis` its vocabulary axis; absent tokens are LOWEST in it.
"""

import jax
import jax.numpy as jnp

from kernels.log_prob.arguments import LOWEST, Options, Statistics


def empty(shape, dtype, options: Options) -> Statistics:
    """Before the first block."""
    zero = jnp.zeros(shape, dtype)
    index = jnp.zeros(shape, jnp.int32) if options.argmax else None
    return Statistics(jnp.full(shape, LOWEST, dtype), zero, zero if options.entropy else None, zero, index)


def extend(old: Statistics, x, y, columns, axis: int, keepdims: bool = False) -> Statistics:
    """The statistics after a block of logits x; y is the label's logit, or 0 where it is not in this block.

    columns: number of each token, int32, broadcastable to x. keepdims leaves `axis` in place with size 1.
    """

    def over(reduce, values):
        return reduce(values, axis=axis, keepdims=keepdims)

    def spread(row):
        return row if keepdims else jnp.expand_dims(row, axis)

    largest = over(jnp.max, x)
    m = jnp.maximum(old.m, largest)
    shifted = x - spread(m)
    e, a = jnp.exp(shifted), jnp.exp(old.m - m)
    u = None if old.u is None else a * (old.u + (old.m - m) * old.s) + over(jnp.sum, e * shifted)
    index = old.index
    if index is not None:  # the lowest index wins a tie, within a block and (by >) between blocks
        first = over(jnp.min, jnp.where(x == spread(largest), columns, jnp.iinfo(jnp.int32).max))
        index = jnp.where(largest > old.m, first, index)
    return Statistics(m, a * old.s + over(jnp.sum, e), u, old.y + y, index)


def merge(parts: Statistics, total, largest, lowest) -> Statistics:
    """The statistics of disjoint parts of the vocabulary as those of the whole.

    total, largest, lowest: sum, maximum and minimum over the parts, of an axis or of devices.
    """
    m = largest(parts.m)
    a = jnp.exp(parts.m - m)
    u = None if parts.u is None else total(a * (parts.u + (parts.m - m) * parts.s))
    index = parts.index
    if index is not None:
        index = lowest(jnp.where(parts.m == m, index, jnp.iinfo(jnp.int32).max))
    return Statistics(m, total(a * parts.s), u, total(parts.y), index)


def merge_axis(parts: Statistics) -> Statistics:
    """`merge` of parts along the first axis."""
    return merge(parts, lambda x: x.sum(0), lambda x: x.max(0), lambda x: x.min(0))


def finish(statistics: Statistics) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """logp, lse and entropy (clamped at 0, below which only rounding takes it)."""
    m, s, u, y, _ = statistics
    log_s = jnp.log(s)
    return (y - m) - log_s, m + log_s, None if u is None else jnp.maximum(log_s - u / s, 0)
