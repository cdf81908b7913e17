"""What a model says about every single target of a batch, brought whole to every host.

Sums are left to the caller, in float64: float32 sums over 10^9 tokens would lose the digits that models differ in.

Letters: B batch, T length.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from attnlab.evaluation.evaluator import Context
from attnlab.objectives.language_modelling import LanguageModelling

Array = jax.Array


def score(context: Context, batches: Iterable[dict[str, Array]]) -> Iterator[dict[str, np.ndarray]]:
    """Numpy arrays [B, T] for each global batch, the same on every process, zero where a target does not count:

    nll (nats), hits (1 where the likeliest token is the target), weights, bytes, and the batch's `document`. No z-loss:
    this is the model's likelihood, whatever it was trained with. Ends before the first batch that is all padding; as
    all processes see the whole batch, they end together.
    """
    for scores in _one_ahead(_dispatch(context, batch) for batch in batches):
        scores = jax.device_get(scores)
        if not scores["weights"].any():
            return
        yield scores


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each given out once the next one is made: the device works while the host makes a batch."""
    items = iter(items)
    previous = next(items, None)
    for item in items:
        yield previous
        previous = item
    if previous is not None:
        yield previous


def _dispatch(context: Context, batch: dict[str, Array]) -> dict[str, Array]:
    with jax.set_mesh(context.mesh):
        return _score(Static(context.objective), context.params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _score(objective: "Static", params: Any, batch: dict[str, Array]) -> dict[str, Array]:
    said = objective.value.log_probs(params, batch, return_entropy=False, return_argmax=True)
    weights = batch["weights"]
    scores = {
        "nll": jnp.where(weights > 0, -said.logp * weights, 0),  # where: at padding the loss may be infinite
        "hits": (said.argmax == batch["targets"]) * weights,
        "weights": weights,
        "bytes": batch["bytes"] * weights,
        "document": batch["document"],
    }
    return jax.lax.with_sharding_constraint(scores, P())


class Static:
    """An objective as a static argument of jit; it holds a dict, so it has no hash of its own. Compared by value."""

    def __init__(self, value: LanguageModelling):
        self.value = value

    def __hash__(self) -> int:
        return hash(repr(self.value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.value == other.value
