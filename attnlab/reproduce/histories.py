"""What runs recorded: curves against step and tokens, and the numbers at their end.

Letters: S seeds, T recorded steps.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from attnlab.training.sinks import JSONL, read_jsonl

# name here -> in metrics.jsonl
TRAINING = {
    "reward": "train/reward",
    "entropy": "train/entropy",
    "ess": "train/egsw/ess",
    "zero_std": "train/frac_reward_zero_std",
}
HELD_OUT = {name: f"validation/{name}" for name in ("accuracy", "mean_at_8", "pass_at_8")}
LAST = 20  # steps over which the training metrics of the end are averaged


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values [T] at steps [T] and after so many tokens [T]."""

    steps: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    def mean(self, first: int, last: int) -> float:
        """Over the steps first..last, both included."""
        there = (self.steps >= first) & (self.steps <= last)
        return float(self.values[there].mean()) if there.any() else float("nan")


@dataclasses.dataclass(frozen=True)
class History:
    """One run: a method with a seed."""

    method: str
    seed: int
    curves: Mapping[str, Curve]
    final: Mapping[str, float]  # scalars of the evaluation after training

    @property
    def steps(self) -> int:
        return int(self.curves["reward"].steps[-1])


def read_history(method: str, seed: int, workdir: Path, start: Mapping[str, float]) -> History:
    """From a run's folder; `start` holds the scalars of the policy it began from, which become step 0.

    Runs without sequence weights weigh all alike: their effective sample size is 1.
    """
    records = read_jsonl(workdir / JSONL)
    curves = {name: _curve(records, key, "train/tokens") for name, key in TRAINING.items() if name != "ess"}
    weighted = _curve(records, TRAINING["ess"], "train/tokens")
    reward = curves["reward"]
    curves["ess"] = (
        weighted if len(weighted.steps) else dataclasses.replace(reward, values=np.ones(len(reward.steps)))
    )
    for name, key in HELD_OUT.items():
        curve = _curve(records, key, "validation/tokens")
        both = ((0, curve.steps), (0, curve.tokens), (start[name], curve.values))
        curves[name] = Curve(*(np.concatenate([[first], rest]) for first, rest in both))
    final = json.loads((workdir / "eval" / "problems.json").read_text())["scalars"]
    return History(method, seed, curves, final)


def _curve(records: Sequence[Mapping[str, float]], key: str, tokens: str) -> Curve:
    there = [record for record in records if key in record]
    columns = ("step", tokens, key)
    return Curve(*(np.array([record[column] for record in there], np.float64) for column in columns))


def numbers(history: History) -> dict[str, float]:
    """Of the end: training metrics averaged over the last steps, held-out ones of the final evaluation."""
    last = history.steps
    found = {name: history.curves[name].mean(last - LAST + 1, last) for name in TRAINING}
    return found | {name: float(history.final[name]) for name in HELD_OUT}


def by_method(histories: Sequence[History]) -> dict[str, list[History]]:
    """In the order in which the methods come, seeds ascending."""
    found: dict[str, list[History]] = {}
    for history in histories:
        found.setdefault(history.method, []).append(history)
    return {method: sorted(runs, key=lambda run: run.seed) for method, runs in found.items()}


def differences(a: Sequence[History], b: Sequence[History], value) -> np.ndarray:
    """value(run of a) - value(run of b) [S] for the seeds that both have: they saw the same problems."""
    left, right = ({run.seed: run for run in runs} for runs in (a, b))
    return np.array([value(left[seed]) - value(right[seed]) for seed in sorted(left.keys() & right.keys())])
