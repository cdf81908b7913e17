"""GRPO through train.py in processes of its own: killed at any moment, or spread over two hosts, it learns the same."""

import random
import time

import numpy as np
import pytest

from tests.tasks.runs import metrics
from tests.training.test_processes import (
    finish,
    kill,
    saved_steps,
    steps_of,
    train,
    train_on_two_hosts,
    wait_until,
)

pytestmark = [pytest.mark.processes, pytest.mark.thorough]
STEPS = 16

CONFIG = """
import dataclasses
from attnlab.config import to_config_dict
from attnlab.evaluation.config import EvalConfig
from attnlab.rl.config import CurriculumConfig, EntropyBonusConfig, KLConfig, SequenceWeightConfig
from attnlab.training.checkpoints import CheckpointConfig
from tests.tasks.runs import experiment

GRPO = dict(
    rewards="tests.tasks.runs:printable + exact",
    iterations=2,
    minibatches=2,
    dynamic_sampling=True,
    weights=SequenceWeightConfig(name="egsw"),
    kl=KLConfig(beta=0.1, sync_steps=3),
    entropy_bonus=EntropyBonusConfig(coefficient=0.01, adaptive=True, target=10.0),
    curriculum=CurriculumConfig(level=2, enabled=True),
)

def get_config(variant=""):
    return to_config_dict(experiment(GRPO, steps=16, checkpoint=CheckpointConfig(every=2)))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "eventful.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    finish(train(config, workdir))
    return workdir


def test_killed_at_any_moment_it_ends_as_if_it_never_was(config, unbroken, tmp_path):
    process, chance = train(config, tmp_path), random.Random(0)
    wait_until(lambda: len(saved_steps(tmp_path)) > 1, process)
    time.sleep(chance.uniform(0, 0.2))
    kill(process)
    assert steps_of(tmp_path)[-1] < STEPS, "it was to be killed on its way"
    finish(train(config, tmp_path))
    assert metrics(tmp_path) == metrics(unbroken)
    assert (tmp_path / "completions.jsonl").read_text() == (unbroken / "completions.jsonl").read_text()


def test_two_hosts_learn_what_one_does(config, unbroken, tmp_path):
    """The same problems and completions; rewards are scored where the rows are, and the state is common."""
    finish(*train_on_two_hosts(config, tmp_path, "--config.training.steps=4"))
    two, one = metrics(tmp_path), metrics(unbroken)
    assert sorted(two) == [1, 2, 3, 4]
    assert two[1]["train/reward"] == one[1]["train/reward"]
    for step in two:
        for name in (
            "reward",
            "loss",
            "grad_norm",
            "entropy",
            "kl",
            "entropy_coefficient",
            "curriculum/level",
        ):
            key = f"train/{name}"
            np.testing.assert_allclose(
                two[step][key], one[step][key], rtol=5e-3, atol=1e-5, err_msg=f"{step} {name}"
            )
