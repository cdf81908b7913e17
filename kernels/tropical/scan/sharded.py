"""The max-plus scan with time split over devices: a carried state. See `kernels.sequence`; letters: see the package.

a shard does to a state:  h <- max(sum of a + h, own),   own = max_t (b_t + sum of a after t)
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from kernels import sequence
from kernels.sequence import Axis, Exchange
from kernels.tropical.scan.arguments import Arguments


def carried(operation, arguments: Arguments, axis: Axis):
    """h and whether the carried state won, [B, T, ...] of this device's tokens."""
    a, b = arguments.a, arguments.b
    later = jnp.pad(a[:, 1:], ((0, 0), (0, 1), *((0, 0),) * (a.ndim - 2)))
    reached = b + lax.cumsum(later, axis=1, reverse=True)
    # By its index, so that the gradient is not split over ties; the first of equals is the one carried farthest.
    own = jnp.take_along_axis(reached, jnp.argmax(reached, axis=1, keepdims=True), axis=1)[:, 0]
    h0 = sequence.exclusive((a.sum(1), own), arguments.h0, _combine, axis)
    return operation(dataclasses.replace(arguments, h0=h0))


def _combine(h, shard):
    total, own = shard
    kept = total + h
    return jnp.where(kept >= own, kept, own)


EXCHANGES = (Exchange(carried),)
