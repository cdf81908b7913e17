"""The state of a training run on the device, and one optimiser step as a pure function.

Letters: B rows of the global batch, A micro-batches (gradient accumulation).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from attnlab.objectives.objective import Objective, add_terms, average, no_terms

Array = jax.Array


@struct.dataclass
class TrainState:
    """step [] int32: updates done; params; opt_state; rng [2] uint32: key data of which each update's key is made."""

    step: Array
    params: Any
    opt_state: Any
    rng: Array


def init_state(objective: Objective, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step; jit it with out_shardings so that it is born sharded."""
    key = jax.random.key(seed)
    params = objective.init(jax.random.fold_in(key, 0))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(jax.random.fold_in(key, 1)),
    )


def split_batch(batch: dict[str, Array], parts: int) -> dict[str, Array]:
    """[B, ...] -> [A, B/A, ...], taking every A-th row, so that rows stay on the device that holds them."""

    def split(x):
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def summed_gradients(objective: Objective, params: Any, batch: dict[str, Array], rng: Array, parts: int):
    """(gradient of the loss sum over all rows, Terms of all rows), computed in `parts` micro-batches."""

    def loss_sum(params, batch, rng):
        terms = objective(params, batch, rng)
        return terms.loss_sum, terms

    gradient = jax.grad(loss_sum, has_aux=True)
    if parts == 1:
        return gradient(params, batch, rng)

    def accumulate(sums, part):
        index, micro = part
        grads, terms = gradient(params, micro, jax.random.fold_in(rng, index))
        return (jax.tree.map(jnp.add, sums[0], grads), add_terms(sums[1], terms)), None

    micro = split_batch(batch, parts)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro), rng)
    grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[0])
    sums, _ = jax.lax.scan(accumulate, (grads, no_terms(shapes[1])), (jnp.arange(parts), micro))
    return sums


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    objective: Objective,
    optimizer,
    schedule,
    parts: int,
    updates_per_step: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One update. One whose loss or gradient is not finite leaves params and optimiser as they were.

    Returns the new state and scalars: loss, the objective's metrics, grad_norm, learning_rate, nonfinite (0 or 1).
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    grads, terms = summed_gradients(objective, state.params, batch, rng, parts)
    grads = jax.tree.map(lambda g: g / jnp.maximum(terms.weight, 1e-9).astype(g.dtype), grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(terms.loss_sum)
    learning_rate = schedule(state.step // updates_per_step)
    directions, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, directions)

    def keep_finite(new, old):
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    new = state.replace(
        step=state.step + 1,
        params=keep_finite(params, state.params),
        opt_state=keep_finite(opt_state, state.opt_state),
    )
    scalars = average(terms) | {
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "nonfinite": 1.0 - finite.astype(jnp.float32),
    }
    return new, scalars
