"""One optimiser step: accumulation is exact, micro-batches stay on their devices, non-finite steps do nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.objectives.objective import Terms
from attnlab.training.optimizer import OptimizerConfig, make_optimizer
from attnlab.training.state import init_state, split_batch, summed_gradients, train_step
from attnlab.training.trees import named_leaves


@dataclasses.dataclass(frozen=True)
class WeightedLine:
    """loss = sum of w (a x + b - y)^2 over the batch, an objective with uneven weights."""

    def init(self, rng):
        return {"a": {"kernel": jax.random.normal(rng, (1,))}, "b": {"bias": jnp.zeros(1)}}

    def __call__(self, params, batch, rng):
        error = params["a"]["kernel"] * batch["x"] + params["b"]["bias"] - batch["y"]
        noise = jnp.sum(jax.random.normal(rng, ()))
        loss = jnp.sum(batch["w"] * jnp.square(error))
        return Terms(loss, jnp.sum(batch["w"]), {"noise": (noise, jnp.float32(1))})

    def forward_flops_per_token(self):
        return 2.0


OBJECTIVE = WeightedLine()
OPTIMIZER = make_optimizer(OptimizerConfig(weight_decay=0.0, clip_norm=0.0))
ROWS = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)
BATCH = {"x": jnp.array(ROWS[0]), "y": jnp.array(ROWS[1]), "w": jnp.array(np.abs(ROWS[2]))}


def step(state, batch, parts=1):
    call = functools.partial(
        train_step,
        objective=OBJECTIVE,
        optimizer=OPTIMIZER,
        schedule=lambda step: 0.1 * (step + 1),
        parts=parts,
    )
    return jax.jit(call)(state, batch)


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    params = OBJECTIVE.init(jax.random.key(0))
    whole, terms = summed_gradients(OBJECTIVE, params, BATCH, jax.random.key(1), 1)
    parts_sum, parts_terms = summed_gradients(OBJECTIVE, params, BATCH, jax.random.key(1), parts)
    for name, value in named_leaves(whole).items():
        np.testing.assert_allclose(named_leaves(parts_sum)[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(parts_terms.loss_sum, terms.loss_sum, rtol=1e-6)
    np.testing.assert_allclose(parts_terms.weight, terms.weight, rtol=1e-6)


def test_micro_batches_have_keys_of_their_own():
    params = OBJECTIVE.init(jax.random.key(0))
    _, terms = summed_gradients(OBJECTIVE, params, BATCH, jax.random.key(1), 2)
    draws = [jax.random.normal(jax.random.fold_in(jax.random.key(1), i), ()) for i in range(2)]
    np.testing.assert_allclose(terms.metrics["noise"][0], sum(draws), rtol=1e-6)


def test_split_keeps_each_devices_rows_together():
    """Eight rows on four devices, two parts: part 0 is rows 0, 2, 4, 6, one from each device."""
    parts = split_batch({"x": jnp.arange(8)}, 2)["x"]
    np.testing.assert_array_equal(parts, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_update_is_minus_rate_times_direction_and_counts():
    state = init_state(OBJECTIVE, OPTIMIZER, seed=0)
    new, scalars = step(state, BATCH)
    assert int(new.step) == 1 and float(scalars["learning_rate"]) == pytest.approx(0.1)
    moved = np.asarray(state.params["a"]["kernel"] - new.params["a"]["kernel"])
    np.testing.assert_allclose(np.abs(moved), 0.1, rtol=1e-4)  # Adam's first direction has size 1
    total = BATCH["w"].sum()
    loss = OBJECTIVE(state.params, BATCH, jax.random.key(0)).loss_sum
    np.testing.assert_allclose(scalars["loss"], loss / total, rtol=1e-5)
    grads, _ = summed_gradients(OBJECTIVE, state.params, BATCH, jax.random.key(0), 1)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    np.testing.assert_allclose(
        scalars["grad_norm"], norm / total, rtol=1e-5
    )  # of the mean loss: clipping sees this


def test_each_step_has_a_key_of_its_own_and_a_run_repeats():
    state = init_state(OBJECTIVE, OPTIMIZER, seed=0)
    one, first = step(state, BATCH)
    _, second = step(one, BATCH)
    _, again = step(state, BATCH)
    assert first["noise"] != second["noise"] and first["noise"] == again["noise"]
    other = init_state(OBJECTIVE, OPTIMIZER, seed=1)
    assert other.params["a"]["kernel"] != state.params["a"]["kernel"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_step_leaves_parameters_and_moments(bad):
    state, _ = step(init_state(OBJECTIVE, OPTIMIZER, seed=0), BATCH)
    new, scalars = step(state, BATCH | {"y": BATCH["y"].at[3].set(bad)})
    assert float(scalars["nonfinite"]) == 1 and int(new.step) == 2
    for before, after in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((new.params, new.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(before, after)


def test_an_empty_batch_moves_nothing():
    state = init_state(OBJECTIVE, OPTIMIZER, seed=0)
    new, scalars = step(state, BATCH | {"w": jnp.zeros(12)})
    assert float(scalars["loss"]) == 0
    np.testing.assert_array_equal(new.params["a"]["kernel"], state.params["a"]["kernel"])
