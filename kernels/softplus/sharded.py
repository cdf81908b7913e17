"""Softplus attention with time split over devices: a ring of keys for one stage, rows alone for two. See
`kernels.rings`.

Letters: B batch, T queries, S keys of a shard, H query heads, Dv head size of v; a the weights of stage 1. Without
re-weighting sums over shards add up: sum a v, and for normalise="l1" also Z = sum a, which a channel of ones in v gives
with its gradient. Re-weighting needs Z and the largest a of a whole row before its second sweep, and exp its largest
score: there each device sweeps its rows over all keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kernels import rings
from kernels.sequence import ROWS, Axis, Exchange
from kernels.softplus.arguments import Arguments
from kernels.softplus.weights import reciprocal


def ring(operation, arguments: Arguments, axis: Axis) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """o [B, T, H, Dv] in q's dtype and the row statistics of this device's rows over the keys of all devices."""

    def local(source, arguments, *_):
        return _sums(operation, arguments)

    total, Z = rings.ring_of_keys(local, rings.Sum(), arguments, ("k", "v"), axis)
    o = total * reciprocal(Z)[..., None] if arguments.options.normalise == "l1" else total
    nothing = jnp.zeros_like(Z)
    return o.astype(arguments.q.dtype), (Z, nothing, nothing, nothing)


def _sums(operation, a):
    """(sum a v [B, T, H, Dv], sum a [B, T, H]); a carries its share, unless that is 1 / Z."""
    divide = a.options.normalise == "l1"
    if divide:
        v = jnp.concatenate([a.v, jnp.ones_like(a.v[..., :1])], axis=-1)
        a = dataclasses.replace(a, v=v, options=dataclasses.replace(a.options, normalise="none"))
    o, (Z, *_) = operation(a)
    o, Z = o.astype(a.accumulator), lax.stop_gradient(Z)
    if not divide:
        return o, Z
    # The value of the float32 statistic, which has not passed through q's dtype, with the gradient of the channel.
    return o[..., :-1], Z + o[..., -1] - lax.stop_gradient(o[..., -1])


def _fits(arguments, size):
    one_stage = arguments.options.power is None and arguments.options.phi != "exp"
    return one_stage and rings.can_ring(arguments.mask, arguments.q.shape[1], arguments.k.shape[1])


EXCHANGES = (Exchange(ring, _fits), ROWS)
