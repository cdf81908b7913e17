"""A tiny GRPO run on generated problems."""

import dataclasses
from pathlib import Path
from typing import Any

from attnlab.config import Experiment
from attnlab.data.config import DataConfig
from attnlab.evaluation.config import EvalConfig
from attnlab.experiment import open_task, prepare
from attnlab.models.config import ModelConfig
from attnlab.rl.config import GRPOConfig, RolloutConfig
from attnlab.training.checkpoints import CheckpointConfig
from attnlab.training.config import TrainingConfig
from attnlab.training.loop import Summary, train
from attnlab.training.optimizer import OptimizerConfig
from attnlab.training.schedules import ScheduleConfig
from attnlab.training.sinks import read_jsonl

CLOCKED = (
    "seconds",
    "time/",
    "tokens_per_second",
    "data_wait",
)  # parts of metrics' names that no two runs share


def printable(texts, **_) -> list[float]:
    """A reward that a policy which knows nothing can get: how many characters are plain ones."""
    return [sum(" " <= character <= "~" for character in text) / 4 for text in texts]


def digit(texts, **_) -> list[float]:
    """A reward that few get."""
    return [float(any(character.isdigit() for character in text)) for text in texts]


def experiment(grpo: dict[str, Any] | None = None, **training) -> Experiment:
    """Eight prompts, groups of four, one layer; `grpo` and `training` change fields."""
    steps = training.get("steps", 4)
    rollout = RolloutConfig(max_prompt_tokens=6, max_new_tokens=4)
    options = {
        "problems": "problems:copy(level=3)",
        "rewards": "exact + tests.tasks.runs:printable",
        "group_size": 4,
    }
    defaults = {
        "steps": steps,
        "log_every": 1,
        "eval_every": 0,
        "optimizer": OptimizerConfig(schedule=ScheduleConfig(peak=1e-2, warmup_steps=0, shape="constant")),
        "checkpoint": CheckpointConfig(every=2),
    }
    return Experiment(
        task="grpo",
        model=ModelConfig(
            layers="forgetting", num_layers=1, hidden_size=32, num_heads=8, head_dim=4, mlp_size=64
        ),
        data=DataConfig(batch_size=8),
        grpo=GRPOConfig(**(options | {"rollout": rollout} | (grpo or {}))),
        training=TrainingConfig(**(defaults | training)),
        eval=EvalConfig(problems=8, problem_samples=4, pass_at=(1, 4)),
    )


def run(experiment: Experiment, workdir: Path, devices=None) -> Summary:
    task = open_task(experiment)
    prepare(task, workdir)
    return train(experiment.training, task, workdir, devices)


def metrics(workdir: Path) -> dict[int, dict[str, float]]:
    """Training metrics by step, without what depends on the clock."""
    records = [r for r in read_jsonl(workdir / "metrics.jsonl") if "train/reward" in r]
    return {
        record["step"]: {k: v for k, v in record.items() if not any(part in k for part in CLOCKED)}
        for record in records
    }


def change(experiment: Experiment, **training) -> Experiment:
    return dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, **training))
