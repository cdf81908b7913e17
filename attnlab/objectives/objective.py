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

    maxima: name -> [] float32, of which the largest over all micro-batches is reported.
    """

    loss_sum: Array
    weight: Array
    metrics: dict[str, tuple[Array, Array]]
    maxima: dict[str, Array] = struct.field(default_factory=dict)


class Objective(Protocol):
    """A task. `init` makes parameters; calling it gives the terms of one (micro-)batch."""

    def init(self, rng: Array) -> Any: ...

    def __call__(self, params: Any, batch: dict[str, Array], rng: Array) -> Terms: ...

    def forward_flops_per_token(self) -> float: ...


def add_terms(a: Terms, b: Terms) -> Terms:
    """The terms of two micro-batches together."""
    sums = jax.tree.map(jnp.add, a.replace(maxima={}), b.replace(maxima={}))
    return sums.replace(maxima=jax.tree.map(jnp.maximum, a.maxima, b.maxima))


def average(terms: Terms) -> dict[str, Array]:
    """{"loss": ..., metric: ...} as ratios, and the maxima; a ratio of nothing is 0."""
    ratios = {"loss": (terms.loss_sum, terms.weight), **terms.metrics}
    return {
        name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in ratios.items()
    } | terms.maxima
