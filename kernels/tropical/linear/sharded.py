"""Max-plus linear attention with time split over devices: a carried state. See `kernels.sequence`; letters: `linear`.

    a shard does to a state:  M <- max(sum of a + M, own),   own: the state after the shard alone, from nothing

Which key an entry of the carried state comes from is not known here. So winners are not to be had, and among entries
of one channel that are equal to the last bit the gradient goes to the lowest d', not to the oldest key.
"""

import dataclasses

import jax.numpy as jnp

from kernels import sequence
from kernels.sequence import Axis, Exchange
from kernels.tropical.linear.arguments import Arguments


def carried(operation, arguments: Arguments, axis: Axis):
    """c of this device's rows, winners that are of no use, and the state after the last token of all."""
    a, K = arguments, arguments.k.shape[2]
    # Queries do not matter to the state: one head each, of zeros.
    alone = dataclasses.replace(a, q=jnp.zeros_like(a.q[:, :, :K]), m0=jnp.full_like(a.m0, -jnp.inf))
    own = operation(alone)[2]
    total = jnp.where(a.fresh.any(1)[:, None], -jnp.inf, a.a.sum(1))
    m0 = sequence.exclusive((total, own), a.m0, _combine, axis)
    c, winners, state = operation(dataclasses.replace(a, m0=m0))
    return c, winners, sequence.last(state, axis)


def _combine(state, shard):
    total, own = shard
    kept = total[..., None, None] + state
    return jnp.where(kept >= own, kept, own)


EXCHANGES = (Exchange(carried),)
