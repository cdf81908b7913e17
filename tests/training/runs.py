"""A tiny language-modelling run on text made here, for the tests of the trainer."""

import dataclasses
import random
from pathlib import Path

import pytest

from attnlab.attention.forgetting import PRO, ForgettingConfig
from attnlab.config import Experiment
from attnlab.data.config import DataConfig
from attnlab.evaluation.config import EvalConfig
from attnlab.experiment import open_task, prepare
from attnlab.models.config import ModelConfig
from attnlab.training.checkpoints import CheckpointConfig
from attnlab.training.config import TrainingConfig
from attnlab.training.loop import Summary, train
from attnlab.training.optimizer import OptimizerConfig
from attnlab.training.schedules import ScheduleConfig
from attnlab.training.sinks import read_jsonl


def write_text(folder: Path, files: int = 40) -> Path:
    """Files of easy text: a learner's loss falls at once."""
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    words = ["alpha", "beta", "gamma", "delta"]
    for number in range(files):
        text = " ".join(random.choice(words) for _ in range(random.randint(5, 120)))
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def experiment(text: Path, **training) -> Experiment:
    """Two layers, eight heads; `training` changes TrainingConfig fields."""
    steps = training.get("steps", 4)
    schedule = ScheduleConfig(peak=1e-2, warmup_steps=min(2, steps - 1), shape="constant")
    defaults = {
        "steps": steps,
        "log_every": 1,
        "eval_every": 0,
        "optimizer": OptimizerConfig(schedule=schedule),
        "checkpoint": CheckpointConfig(every=2),
    }
    return Experiment(
        model=ModelConfig(
            layers="forgetting + softmax",
            num_layers=2,
            hidden_size=32,
            num_heads=8,
            head_dim=4,
            mlp_size=64,
            init_std=0.1,
            mixers={"forgetting": ForgettingConfig(**PRO)},
        ),
        data=DataConfig(
            source=f"local:{text}",
            split="train[:90%]",
            eval_split="train[90%:]",
            data_dir=f"{text}-prepared",
            sequence_length=32,
            batch_size=16,
        ),
        training=TrainingConfig(**(defaults | training)),
        eval=EvalConfig(batches=1, sample_tokens=3, samples=1),
    )


def run(experiment: Experiment, workdir: Path, devices=None) -> Summary:
    task = open_task(experiment)
    prepare(task, workdir)
    return train(experiment.training, task, workdir, devices)


def losses(workdir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {r["step"]: r["train/loss"] for r in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in r}


def change(experiment: Experiment, **training) -> Experiment:
    return dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, **training))
