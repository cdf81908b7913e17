"""Streaming attention with time split over devices: a ring of keys, or rows alone. See `kernels.rings`.

Letters: B batch, T queries, S keys of a shard, H query heads. A score may read absolute positions, while a call over
one shard of keys counts from its first key; so the score is moved there, by a number that every head is given.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import rings
from kernels.sequence import ROWS, Axis, Exchange
from kernels.streaming.arguments import Arguments, Score


@dataclass(frozen=True)
class Moved:
    """`score` at positions moved by the last of the extras, a whole number (exact below 2^24)."""

    score: Score

    def __call__(self, x, rows, cols, of_rows, of_cols, extras):
        *extras, first = extras
        first = first.astype(jnp.int32)
        return self.score(x, rows + first, cols + first, of_rows, of_cols, tuple(extras))


def ring(operation, arguments: Arguments, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] in q's dtype and lse [B, T, H] of this device's rows over the keys of all devices."""
    H, values = arguments.q.shape[2], arguments.values

    def local(source, arguments, values, cols):
        first = jnp.full((H,), source * arguments.k.shape[1], arguments.accumulator)
        values = dataclasses.replace(values, cols=cols, extras=(*values.extras, first))
        return operation(dataclasses.replace(arguments, values=values, score=Moved(arguments.score)))

    bare, rows = dataclasses.replace(arguments, values=None), dataclasses.replace(values, cols=())
    o, lse = rings.ring_of_keys(local, rings.Softmax(), bare, ("k", "v"), axis, stay=rows, travel=values.cols)
    return o.astype(arguments.q.dtype), lse


EXCHANGES = (Exchange(ring, lambda a, size: rings.can_ring(a.mask, a.q.shape[1], a.k.shape[1])), ROWS)
