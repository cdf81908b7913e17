"""From a configuration to a task, and from a run's folder back to its parameters."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from attnlab.config import ConfigError, Experiment, read_experiment, to_dict
from attnlab.tasks import TASKS
from attnlab.training import multihost
from attnlab.training.files import CHECKPOINTS, CONFIG, write_atomically
from attnlab.training.loop import restore_state
from attnlab.training.task import Task


def open_task(experiment: Experiment) -> Task:
    """The task of a validated experiment; reads the tokeniser, and prepares no data unless the model holds some."""
    return TASKS[experiment.task](experiment)


def prepare(task: Task, workdir: Path) -> None:
    """Get the data in place (process 0 first) and write <workdir>/config.json; collective over all processes.

    ConfigError if the folder holds a run which this experiment cannot go on with; nothing in it is touched then.
    """
    if (workdir / CONFIG).exists():
        old = load_config(workdir)  # refused, not overwritten, where it is not a run's
        if any((workdir / CHECKPOINTS).glob("*")):
            check_continues(old, task.experiment, workdir)
    task.prepare(workdir)
    if multihost.is_main():
        write_atomically(workdir / CONFIG, json.dumps(to_dict(task.experiment), indent=2) + "\n")


FREE_FIELDS = ("dtype", "remat", "implementation")  # these change arithmetic or memory, not the parameters
FIXED_DATA_FIELDS = (
    "source",
    "split",
    "batch_size",
    "packing",
    "learn_after",
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


def check_same_model(old: Experiment, new: Experiment, folder: Path) -> None:
    """ConfigError naming the first field in which the model of the run in `folder` differs from the new one."""
    before, after = _model_fields(old), _model_fields(new)
    for name in before | after:
        if before.get(name) != after.get(name):
            raise ConfigError(
                f"init_from={str(folder)!r} holds parameters with {name}={before.get(name)!r}, which do not fit "
                f"{after.get(name)!r}; use that run's model"
            )


def _lasting_fields(experiment: Experiment) -> dict[str, Any]:
    """What fixes the parameters' shapes and meaning, the place in the data, and the task's memory, by name."""
    fields = {"task": experiment.task} | _model_fields(experiment)
    fields |= {f"data.{name}": getattr(experiment.data, name) for name in FIXED_DATA_FIELDS}
    if experiment.task == "grpo":
        grpo = experiment.grpo
        fields |= {f"grpo.{name}": getattr(grpo, name) for name in ("problems", "template", "group_size")}
        fields |= {
            "a reference policy": bool(grpo.kl.beta),
            "grpo.curriculum.enabled": grpo.curriculum.enabled,
            "grpo.entropy_bonus.adaptive": grpo.entropy_bonus.adaptive,
            "updates a step": grpo.updates,  # by which the learning-rate schedule counts
        }
    return fields


def _model_fields(experiment: Experiment) -> dict[str, Any]:
    """What fixes the parameters' shapes and meaning."""
    fields = {"data.tokenizer": experiment.data.tokenizer}
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
    return fields


def load_config(workdir: Path) -> Experiment:
    """The experiment of a run's folder; ConfigError when there is none."""
    path = workdir / CONFIG
    if not path.exists():
        raise ConfigError(
            f"{workdir} has no {CONFIG}, so it is not the folder of a run; give --workdir of one"
        )
    return read_experiment(path)


def restore_params(
    workdir: Path, task: Task, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[int, Any] | None:
    """(step, params) of the newest intact checkpoint, or of `step`, laid out on `mesh`; None if there is none."""
    restored = restore_state(task.experiment.training, task, workdir, mesh, step=step)
    return restored and (restored[0], restored[1]["state"].params)
