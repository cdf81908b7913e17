"""Every registered mechanism trains as a language model in the smoke sizes: its loss falls, nothing is not finite."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from attnlab.attention.mixer import MIXERS
from attnlab.config import SMOKE
from attnlab.experiment import open_task, prepare
from attnlab.models.config import ModelConfig
from attnlab.training.optimizer import make_optimizer
from attnlab.training.state import init_state, train_step
from tests.training import runs
from tests.training.runs import text_folder  # noqa: F401 (a fixture)

STEPS = 25


# Quick ones in every run of the tests, the others in the thorough one.
QUICK = ("softmax", "forgetting", "cosformer", "softplus", "inverse_distance")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in sorted(MIXERS)],
)
def test_loss_falls(name, text_folder, tmp_path):  # noqa: F811
    base = runs.experiment(text_folder)
    sizes = {k: v for k, v in SMOKE["model"].items() if k != "vocab_size"}
    model = ModelConfig(layers=name, num_layers=2, init_std=0.1, **sizes)
    experiment = dataclasses.replace(base, model=model)
    task = open_task(experiment)
    prepare(task, tmp_path)
    optimizer = make_optimizer(experiment.training.optimizer)
    state = init_state(task.objective, optimizer, seed=0)
    step = functools.partial(
        train_step, objective=task.objective, optimizer=optimizer, schedule=lambda step: 1e-2, parts=1
    )
    step, losses = jax.jit(step), []
    for batch, _ in itertools.islice(task.batches(range(task.batch_size), None), STEPS):
        state, scalars = step(state, batch)
        losses.append(float(scalars["loss"]))
    assert np.all(np.isfinite(losses))
    assert np.mean(losses[-3:]) < losses[0] - 1.0, losses
