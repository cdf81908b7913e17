"""The contract between a task and the trainer.

A loss is a sum over counted items and their number, never a mean: sums of micro-batches and of devices can be added,
so gradient accumulation and sharding give the gradient of the whole batch exactly, whatever the padding.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Terms:
    """loss_sum and weight [] float32; metrics: name -> (sum, weight), both [] float32, reported as sum / weight.

    extremes: name -> [] float32, of which the largest over all micro-batches is reported, or the smallest if the name
    ends in "_min".
    """

    loss_sum: Array
    weight: Array
    metrics: dict[str, tuple[Array, Array]]
    extremes: dict[str, Array] = struct.field(default_factory=dict)


class Objective(Protocol):
    """A task. `init` makes parameters; calling it gives the terms of one (micro-)batch."""

    def init(self, rng: Array) -> Any: ...

    def __call__(self, params: Any, batch: dict[str, Array], rng: Array) -> Terms: ...

    def forward_flops_per_token(self) -> float: ...


def add_terms(a: Terms, b: Terms) -> Terms:
    """The terms of two micro-batches together."""
    sums = jax.tree.map(jnp.add, a.replace(extremes={}), b.replace(extremes={}))
    wider = {name: _outermost(name)(value, b.extremes[name]) for name, value in a.extremes.items()}
    return sums.replace(extremes=wider)


def no_terms(shapes: Terms) -> Terms:
    """The terms of nothing at all, to add others to."""
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    limits = {
        name: x + (jnp.inf if name.endswith("_min") else -jnp.inf) for name, x in zeros.extremes.items()
    }
    return zeros.replace(extremes=limits)


def _outermost(name: str):
    return jnp.minimum if name.endswith("_min") else jnp.maximum


def average(terms: Terms) -> dict[str, Array]:
    """{"loss": ..., metric: ...} as ratios, and the extremes; a ratio of nothing is 0."""
    ratios = {"loss": (terms.loss_sum, terms.weight), **terms.metrics}
    return {
        name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in ratios.items()
    } | terms.extremes
