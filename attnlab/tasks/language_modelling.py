"""Language-model pretraining, and supervised warm starts on the solutions of problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attnlab.config import Experiment
from attnlab.data.loader import make_loader
from attnlab.data.tokenizers import Tokenizer, open_tokenizer
from attnlab.evaluation import Context, run, write
from attnlab.objectives.language_modelling import LanguageModelling
from attnlab.tasks.streams import fill_streams, open_split
from attnlab.tasks.warm_start import WarmStart
from attnlab.training import multihost
from attnlab.training.task import OneUpdateAStep

SAMPLE_CHARACTERS = 800  # of the generated text, shown at the end of a run


@dataclasses.dataclass
class LanguageModellingTask(OneUpdateAStep, WarmStart):
    """Next-token prediction on documents."""

    experiment: Experiment
    tokenizer: Tokenizer
    objective: LanguageModelling

    cursor_width = 2  # documents begun, tokens of the current one
    evaluators = ("held_out", "per_position", "generate")  # of eval.py, unless it is told others

    @classmethod
    def open(cls, experiment: Experiment) -> LanguageModellingTask:
        tokenizer = open_tokenizer(experiment.data.tokenizer)
        model = fill_streams(experiment.model.with_vocab(tokenizer.vocab_size), experiment.data, tokenizer)
        experiment = dataclasses.replace(experiment, model=model)
        objective = LanguageModelling(
            experiment.model, experiment.language_modelling, experiment.data.sequence_length
        )
        return cls(experiment, tokenizer, objective)

    @property
    def batch_size(self) -> int:
        return self.experiment.data.batch_size

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.experiment.data.sequence_length

    def prepare(self, workdir: Path) -> None:
        """Get the data in place, process 0 first; collective over all processes."""
        del workdir
        data = self.experiment.data
        for split in (data.split, data.eval_split):
            open_split(data, split, "data split")

    def batches(self, rows: Sequence[int], cursor: np.ndarray | None):
        data = self.experiment.data
        return make_loader(
            data, self.tokenizer, rows=rows, split=data.split, repeat=True, shuffle=True, cursor=cursor
        )

    def context(
        self, params: Any, mesh: jax.sharding.Mesh, step: int | None = None, split: str = ""
    ) -> Context:
        """For evaluators."""
        return Context(self.experiment, self.objective, params, mesh, self.tokenizer, step, split)

    def evaluate(self, params: Any, mesh: jax.sharding.Mesh) -> dict[str, float]:
        return run("held_out", self.context(params, mesh)).scalars

    def finish(self, params: Any, mesh: jax.sharding.Mesh, workdir: Path) -> list[Path]:
        context = self.context(params, mesh, self.experiment.training.steps)
        result = run("generate", context)
        if multihost.is_main():
            print(result.text[:SAMPLE_CHARACTERS], flush=True)
        return write(result, workdir / "eval")
