"""Tropical attention with time split over devices: a ring of keys, or rows alone. See `kernels.rings`.

Letters: see the package; S keys of a shard. Contexts of disjoint keys join by `combine_contexts`, without rounding, and
the cotangent of a context belongs to the shard whose key won it. Smooth maxima have no winner: each device takes its
rows over all keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kernels import rings
from kernels.sequence import ROWS, Axis, Exchange
from kernels.tropical.attention.arguments import Arguments
from kernels.tropical.attention.combine import combine_contexts, shift_winners


class Largest:
    """Parts (c, j): contexts and their winners, numbered over all keys."""

    def start(self, part):
        c, j = part
        return jnp.full(c.shape, -jnp.inf, c.dtype), jnp.full(j.shape, -1, j.dtype)

    def join(self, total, part):
        return combine_contexts(total, part)

    def cotangent(self, total, d_total, part):
        own = (part[1] == total[1]) & (part[1] >= 0)
        return jnp.where(own, d_total[0], 0), rings.no_gradient(part[1])


def ring(operation, arguments: Arguments, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Context and winners [B, T, H, Dv] of this device's rows over the keys of all devices. A bias is whole in S."""

    def local(source, arguments, *_):
        bias, S = arguments.bias, arguments.k.shape[1]
        if bias is not None and bias.shape[3] > 1:
            bias = lax.dynamic_slice_in_dim(bias, source * S, S, axis=3)
        c, j = operation(dataclasses.replace(arguments, bias=bias))
        return c, shift_winners(j, source * S)

    return rings.ring_of_keys(local, Largest(), arguments, ("k", "v"), axis)


def _fits(arguments, size):
    return arguments.beta is None and rings.can_ring(
        arguments.mask, arguments.q.shape[1], arguments.k.shape[1]
    )


EXCHANGES = (Exchange(ring, _fits), ROWS)
