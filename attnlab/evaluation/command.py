"""What `eval.py` does between its flags and the evaluators: names, overrides, mesh, checkpoint, and the report."""

import ast
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from attnlab.config import ConfigError, Experiment, from_config_dict
from attnlab.evaluation.evaluator import Context, Result
from attnlab.evaluation.files import write
from attnlab.evaluation.registry import find_evaluator, run
from attnlab.training import multihost
from attnlab.training.checkpoints import CheckpointConfig, Checkpoints
from attnlab.training.files import CHECKPOINTS
from attnlab.training.sharding import MeshConfig, make_mesh

OVERRIDABLE = ("eval", "data", "model", "training.mesh")
FIXED = {"data.batch_size": "eval.batch_size"}  # checkpoints hold a data position for each row of the batch


def parse_names(text: str) -> tuple[str, ...]:
    """ "held_out,generate" -> names, each once; ValueError with the nearest name for an unknown one."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError(f"no evaluator in {text!r}; give one, such as held_out")
    for name in names:
        find_evaluator(name)
    return names


def override(experiment: Experiment, settings: Sequence[str]) -> Experiment:
    """The experiment with settings such as "eval.batches=4" applied, in order; ConfigError for what does not fit."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ConfigError(f"setting {setting!r} is not understood; write it like eval.batches=4")
        if not any(path.startswith(f"{part}.") for part in OVERRIDABLE):
            raise ConfigError(f"setting {setting!r} has no effect here; only {', '.join(OVERRIDABLE)} do")
        if path in FIXED:
            raise ConfigError(f"setting {setting!r} belongs to the checkpoint; set {FIXED[path]} instead")
        experiment = from_config_dict(_nested(experiment, path.split("."), text), experiment)
    return experiment


def _nested(part: Any, names: list[str], text: str) -> dict[str, Any]:
    """{"a": {"b": value}} of names ["a", "b"]; a text field takes the text as it is."""
    name, *rest = names
    current = part.get(name) if isinstance(part, dict) else getattr(part, name, None)
    return {name: _nested(current, rest, text) if rest else _value(text, current)}


def _value(text: str, current: Any) -> Any:
    if isinstance(current, str):
        return text
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def open_mesh(config: MeshConfig, batch_size: int) -> Mesh:
    """The mesh of the configuration if it fits the devices here, else all of them along the data axis.

    A single process takes no more devices than divide batch_size, by which the saved data position is laid out.
    """
    devices = jax.devices()
    try:
        return make_mesh(config, devices)
    except ValueError:
        if jax.process_count() == 1:
            devices = devices[: math.gcd(len(devices), batch_size)]
        return make_mesh(MeshConfig(), devices)


def choose_step(workdir: Path, config: CheckpointConfig, step: int | None, best: bool) -> int | None:
    """The step to restore: the given one, the best one, or None for the newest; ConfigError if it is not there."""
    if step is not None and best:
        raise ConfigError(f"step={step} and best contradict each other; give one of them")
    folder = workdir / CHECKPOINTS
    with Checkpoints(str(folder), config) as saved:
        steps, chosen = saved.steps(), saved.best_step() if best else step
    if not steps:
        raise ConfigError(f"{folder} has no checkpoint; train this run first, or give another workdir")
    if best and chosen is None:
        raise ConfigError(f"no checkpoint in {folder} has a {config.best_metric}; give a step of {steps}")
    if chosen is not None and chosen not in steps:
        raise ConfigError(f"{folder} has no checkpoint of step {chosen}; it has {steps}")
    return chosen


def evaluate(names: Sequence[str], context: Context, folder: Path) -> list[Path]:
    """Run the evaluators, print what they find, write it to `folder`; returns the files."""
    files = []
    for name in names:
        result = run(name, context)
        files += write(result, folder)
        if multihost.is_main():
            print(report(result), flush=True)
    if multihost.is_main():
        print("\n".join(["files:", *(f"  {path}" for path in files)]))
    return files


def report(result: Result) -> str:
    """A few lines for a person: the scalars, `x +- x_se` where there is an error, and the text."""
    lines = [f"{result.name} (step {result.about['step']}, split {result.about['split']})"]
    for name, value in result.scalars.items():
        if name.endswith("_se") and name.removesuffix("_se") in result.scalars:
            continue
        error = result.scalars.get(f"{name}_se")
        shown = f"{value:,.0f}" if error is None and float(value).is_integer() else f"{value:.4f}"
        lines.append(f"  {name:<18} {shown}" + ("" if error is None else f" +- {error:.4f}"))
    return "\n".join([*lines, result.text] if result.text else lines)
