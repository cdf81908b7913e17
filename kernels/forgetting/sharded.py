"""Forgetting attention with time split over devices: a ring of keys, or rows alone. See `kernels.rings`.

Letters: B batch, T queries, S keys of a shard, H query heads; r this device, z the shard whose keys are here; i a row.
A local call counts the gates of shard z only, up to l <= min(a_i, last key of z). What is missing is the same for all
of these keys, so it moves lse alone, and o not at all:

    missing_i = sum of log_f over the shards between z and r  +  sum over the rows' own shard up to i      (z < r)

Causal shards are those of positions, so keys of z > r are invisible, and z = r lacks nothing. Each device gathers the n
sums of whole shards [B, H], which are small. No sum is a difference of others. Pruning compares D with a threshold, so
there what is missing makes another threshold for every row.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kernels import rings, sequence
from kernels.forgetting.arguments import Arguments, BlockSizes
from kernels.sequence import Axis, Exchange


def ring(operation, arguments: Arguments, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] in q's dtype and lse [B, T, H] of this device's rows over the keys of all devices."""
    decay = None if arguments.log_f is None else _decay(arguments.log_f, axis)

    def local(source, arguments, decay, _):
        if decay is None:
            return operation(arguments)
        missing = jnp.where(source < axis.index, _missing(*decay, source, axis), 0)
        if arguments.threshold is not None:  # of D, of which the call sees all but what is missing
            delta = arguments.threshold[:, :, None] - lax.stop_gradient(missing).swapaxes(1, 2)
            arguments = dataclasses.replace(arguments, threshold=delta)
        o, lse = operation(arguments)
        return o, lse + missing

    names = ("k", "v", "log_f")
    o, lse = rings.ring_of_keys(local, rings.Softmax(), _in_shards(arguments), names, axis, stay=decay)
    return o.astype(arguments.q.dtype), lse


def _missing(upto, totals, source, axis):
    """[B, T, H], for the rows of a later shard than `source`."""
    shards = jnp.arange(axis.size)
    between = ((shards > source) & (shards < axis.index)).astype(totals.dtype)
    return jnp.einsum("n,nbh->bh", between, totals, precision="highest")[:, None] + upto


def _decay(log_f, axis):
    """Sums of this shard's gates up to every row [B, T, H], and of all gates of every shard [n, B, H]."""
    upto = jnp.cumsum(log_f, axis=1)
    return upto, lax.all_gather(upto[:, -1], axis.name)


def rows_only(operation, arguments: Arguments, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """The same, each device over all keys."""
    return sequence.rows_only(operation, _in_shards(arguments), axis)


def _in_shards(a):
    """Default block sizes, made for the whole sequence, no larger than its shards."""
    if a.sizes_given:
        return a
    sizes = BlockSizes(min(a.block_sizes.q, a.q.shape[1]), min(a.block_sizes.k, a.k.shape[1]))
    return dataclasses.replace(a, block_sizes=sizes)


def _one_sequence(arguments, size):
    T, S = arguments.q.shape[1], arguments.k.shape[1]
    return rings.can_ring(arguments.mask, T, S) and _whole_blocks(arguments, size)


def _whole_blocks(arguments, size):
    """Pruning goes by blocks: shards must consist of whole ones."""
    sizes, lengths = arguments.block_sizes, (arguments.q.shape[1] // size, arguments.k.shape[1] // size)
    return arguments.threshold is None or not (lengths[0] % sizes.q or lengths[1] % sizes.k)


EXCHANGES = (Exchange(ring, _one_sequence), Exchange(rows_only, _whole_blocks, "t"))
