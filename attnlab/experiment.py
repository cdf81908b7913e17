"""From a configuration to a task, and from a run's folder back to its parameters.

This is where the rooms meet: data, models and objectives become a `Task` for the trainer, evaluators are attached.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attnlab import evaluation
from attnlab.config import ConfigError, Experiment, read_experiment, to_dict
from attnlab.data.config import DataConfig
from attnlab.data.loader import make_loader
from attnlab.data.packing import EncodedDocuments
from attnlab.data.sources import DocumentSource, open_source
from attnlab.data.tokenizers import Tokenizer, open_tokenizer
from attnlab.models.config import ModelConfig
from attnlab.objectives.language_modelling import LanguageModelling
from attnlab.training import multihost
from attnlab.training.files import CHECKPOINTS, CONFIG, write_atomically
from attnlab.training.loop import restore_state

SAMPLE_CHARACTERS = 800  # of the generated text, shown at the end of a run


@dataclasses.dataclass
class LanguageModellingTask:
    """Language-model pretraining as a `attnlab.training.task.Task`."""

    experiment: Experiment
    tokenizer: Tokenizer
    objective: LanguageModelling

    cursor_width = 2  # documents begun, tokens of the current one

    @property
    def batch_size(self) -> int:
        return self.experiment.data.batch_size

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.experiment.data.sequence_length

    def batches(self, rows: Sequence[int], cursor: np.ndarray | None):
        data = self.experiment.data
        return make_loader(
            data, self.tokenizer, rows=rows, split=data.split, repeat=True, shuffle=True, cursor=cursor
        )

    def context(self, params: Any, mesh: jax.sharding.Mesh, step: int | None = None) -> evaluation.Context:
        return evaluation.Context(self.experiment, self.objective, params, mesh, self.tokenizer, step)

    def evaluate(self, params: Any, mesh: jax.sharding.Mesh) -> dict[str, float]:
        return evaluation.run("held_out", self.context(params, mesh)).scalars

    def finish(self, params: Any, mesh: jax.sharding.Mesh, workdir: Path) -> list[Path]:
        context = self.context(params, mesh, self.experiment.training.steps)
        result = evaluation.run("generate", context)
        if multihost.is_main():
            print(result.text[:SAMPLE_CHARACTERS], flush=True)
        return evaluation.write(result, workdir / "eval")


def open_task(experiment: Experiment) -> LanguageModellingTask:
    """The task of a validated experiment; reads the tokeniser, and prepares no data unless the model holds some."""
    tokenizer = open_tokenizer(experiment.data.tokenizer)
    model = fill_streams(experiment.model.with_vocab(tokenizer.vocab_size), experiment.data, tokenizer)
    experiment = dataclasses.replace(experiment, model=model)
    objective = LanguageModelling(
        experiment.model, experiment.language_modelling, experiment.data.sequence_length
    )
    return LanguageModellingTask(experiment, tokenizer, objective)


def fill_streams(model: ModelConfig, data: DataConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model with what its auxiliary streams lack: a length, and the first tokens of the training text.

    Nothing is read for models without a text stream. ValueError if the text is shorter than the stream.
    """
    named, streams = model.auxiliary(), model.streams
    if not named:
        return model
    streams = dataclasses.replace(streams, length=streams.length or data.sequence_length)
    if "text" in named and not streams.fixed_tokens:
        source = _open_split(data, data.split, "fixed text")
        streams = dataclasses.replace(streams, fixed_tokens=first_tokens(source, tokenizer, streams.length))
    return dataclasses.replace(model, streams=streams)


def first_tokens(source: DocumentSource, tokenizer: Tokenizer, count: int) -> tuple[int, ...]:
    """The first `count` tokens of the documents in the source's own order, with BOS and EOS; ValueError if fewer."""
    documents, found = EncodedDocuments(source, tokenizer), []
    for index in range(len(documents)):
        found += documents[index].tokens.tolist()
        if len(found) >= count:
            return tuple(found[:count])
    raise ValueError(
        f"the training text has {len(found)} tokens, but its stream needs {count}; lower model.streams.length"
    )


def _open_split(data: DataConfig, split: str, what: str) -> DocumentSource:
    """A split, prepared by process 0 first; collective over all processes."""
    return open_source(
        data.source,
        split,
        data.data_dir,
        leader=multihost.is_main(),
        barrier=functools.partial(multihost.barrier, f"{what} {split}"),
    )


def prepare(task: LanguageModellingTask, workdir: Path) -> None:
    """Get the data in place (process 0 first) and write <workdir>/config.json; collective over all processes.

    ConfigError if the folder holds a run which this experiment cannot go on with; nothing in it is touched then.
    """
    if (workdir / CONFIG).exists():
        old = load_config(workdir)  # refused, not overwritten, where it is not a run's
        if any((workdir / CHECKPOINTS).glob("*")):
            check_continues(old, task.experiment, workdir)
    data = task.experiment.data
    for split in (data.split, data.eval_split):
        _open_split(data, split, "data split")
    if multihost.is_main():
        write_atomically(workdir / CONFIG, json.dumps(to_dict(task.experiment), indent=2) + "\n")


FREE_FIELDS = ("dtype", "remat", "implementation")  # these change arithmetic or memory, not the parameters
FIXED_DATA_FIELDS = (
    "source",
    "split",
    "tokenizer",
    "batch_size",
    "packing",
    "seed",
)  # give the cursor its meaning


def check_continues(old: Experiment, new: Experiment, workdir: Path) -> None:
    """ConfigError naming the first field which a run in `workdir` cannot change when it goes on."""
    before, after = _lasting_fields(old), _lasting_fields(new)
    for name in before | after:
        if before.get(name) != after.get(name):
            raise ConfigError(
                f"{workdir} holds a run with {name}={before.get(name)!r}, which cannot go on with {after.get(name)!r}; "
                "keep the old value, or give another --workdir"
            )


def _lasting_fields(experiment: Experiment) -> dict[str, Any]:
    """What fixes the parameters' shapes and meaning and the place in the data, by name."""
    fields = {"task": experiment.task}
    for field in dataclasses.fields(experiment.model):
        if field.name not in (*FREE_FIELDS, "layers", "mixers", "streams"):
            fields[f"model.{field.name}"] = getattr(experiment.model, field.name)
    if experiment.model.auxiliary():
        streams = dataclasses.asdict(experiment.model.streams)
        fields |= {f"model.streams.{name}": value for name, value in streams.items()}
    for index, (name, options) in enumerate(experiment.model.layer_configs()):
        fields[f"the mixer of layer {index}"] = name
        kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in FREE_FIELDS}
        fields |= {f"{name}.{option} of layer {index}": value for option, value in kept.items()}
    return fields | {f"data.{name}": getattr(experiment.data, name) for name in FIXED_DATA_FIELDS}


def load_config(workdir: Path) -> Experiment:
    """The experiment of a run's folder; ConfigError when there is none."""
    path = workdir / CONFIG
    if not path.exists():
        raise ConfigError(
            f"{workdir} has no {CONFIG}, so it is not the folder of a run; give --workdir of one"
        )
    return read_experiment(path)


def restore_params(
    workdir: Path, task: LanguageModellingTask, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[int, Any]:
    """(step, params) of the newest intact checkpoint, or of `step`, laid out on `mesh`."""
    training = task.experiment.training
    step, saved = restore_state(training, task, workdir, mesh, step=step)
    return step, saved["state"].params
