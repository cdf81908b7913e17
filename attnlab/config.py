"""An experiment's whole configuration: frozen dataclasses that live with the code they configure, gathered here.

A config file returns `default_config()` with some fields changed; every field can be changed again on the command
line. Nothing is declared twice: the editable ConfigDict is derived from the dataclasses, and turned back into them.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from attnlab.data.config import DataConfig
from attnlab.evaluation.config import EvalConfig
from attnlab.models.config import ModelConfig
from attnlab.objectives.language_modelling import LanguageModellingConfig
from attnlab.rl.config import GRPOConfig
from attnlab.training.config import TrainingConfig

TASKS = ("language_modelling", "grpo")


class ConfigError(ValueError):
    """A field is unknown, of the wrong type, or does not go with another one; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run: what is learnt (task, model, data) and how (training), with what is measured (eval)."""

    task: str = "language_modelling"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = DataConfig()
    language_modelling: LanguageModellingConfig = LanguageModellingConfig()
    grpo: GRPOConfig = GRPOConfig()
    init_from: str = ""  # folder of a run of the same model, whose newest parameters are the first ones here
    training: TrainingConfig = TrainingConfig()
    eval: EvalConfig = EvalConfig()

    def validate(self, devices: int) -> None:
        """Check everything that can be known before compilation on `devices` devices; ConfigError otherwise."""
        try:
            if self.task not in TASKS:
                raise ValueError(f"task={self.task!r} is unknown; choose one of {', '.join(TASKS)}")
            for part in (self.model, self.data, self.language_modelling, self.training, self.eval):
                part.validate()
            if self.task == "grpo":
                self.grpo.validate()
            self._check_batch(devices)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _check_batch(self, devices: int) -> None:
        data, fsdp, sequence, _ = self.training.mesh.shape(devices)
        minibatches = self.grpo.minibatches if self.task == "grpo" else 1
        parts = data * fsdp * self.training.accumulate * minibatches
        if self.data.batch_size % parts:
            cut = f" x grpo.minibatches {minibatches}" if minibatches > 1 else ""
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is not a multiple of mesh data {data} x fsdp {fsdp} x "
                f"training.accumulate {self.training.accumulate}{cut} = {parts}; change one of them"
            )
        if self.data.sequence_length % sequence:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} is not a multiple of mesh.sequence={sequence}"
            )


def default_config() -> ml_collections.ConfigDict:
    """All fields at their defaults, as a locked, typed ConfigDict for config files to edit."""
    return to_config_dict(Experiment())


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A dataclass with nested dataclasses (or dicts of them) -> ConfigDict; None becomes a typed placeholder."""
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif isinstance(value, dict):
            value = ml_collections.ConfigDict({name: to_config_dict(part) for name, part in value.items()})
        elif value is None:
            value = config_dict.placeholder(_plain_type(hints[field.name]))
        result[field.name] = value
    return result.lock()


def from_config_dict(values: Any, default: Any = None, where: str = "config") -> Any:
    """A ConfigDict or dict -> the dataclass of `default` (an Experiment unless given), strictly typed.

    Fields that are missing keep the default; ConfigError names an unknown field's nearest neighbour, or a wrong type.
    """
    default = Experiment() if default is None else default
    if not isinstance(values, (Mapping, ml_collections.ConfigDict)):
        raise ConfigError(f"{where}={values!r} is a {type(values).__name__}; it must hold fields")
    if isinstance(default, dict):
        merged = {}
        for name, value in values.items():
            if name not in default:
                raise ConfigError(f"{where} has no entry {name!r}{_nearest(name, default)}")
            merged[name] = from_config_dict(value, default[name], f"{where}.{name}")
        return default | merged
    fields = {field.name: field for field in dataclasses.fields(default)}
    hints = typing.get_type_hints(type(default))
    changes = {}
    for name, value in dict(values).items():
        if name not in fields:
            raise ConfigError(f"{where} has no field {name!r}{_nearest(name, fields)}")
        current = getattr(default, name)
        if dataclasses.is_dataclass(current) or isinstance(current, dict):
            changes[name] = from_config_dict(value, current, f"{where}.{name}")
        else:
            changes[name] = _typed(value, hints[name], f"{where}.{name}")
    return dataclasses.replace(default, **changes)


def to_dict(experiment: Any) -> dict:
    """Plain nested dicts, for JSON."""
    return dataclasses.asdict(experiment)


def read_experiment(path: Path) -> Experiment:
    """The experiment whose `to_dict` was written to `path` as JSON; ConfigError naming the file if it is not one."""
    try:
        return from_config_dict(json.loads(path.read_text()))
    except ValueError as error:  # not text, not JSON, or not an experiment
        sentence = f"{path} does not hold an experiment ({error}); restore it or choose another folder"
        raise ConfigError(sentence) from error


def check_field(path: str) -> None:
    """ConfigError with the nearest name if an experiment has no field called `path`, such as "training.steps"."""
    part, where = Experiment(), "config"
    for name in path.split("."):
        known = part if isinstance(part, dict) else getattr(part, "__dataclass_fields__", ())
        if name not in known:
            raise ConfigError(f"{where} has no field {name!r}{_nearest(name, known)}")
        part = part[name] if isinstance(part, dict) else getattr(part, name)
        where = f"{where}.{name}"


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"


def _plain_type(hint: Any) -> type:
    """T of T | None, and str of Literal["a", "b"] (whose members `validate` checks)."""
    if typing.get_origin(hint) is typing.Literal:
        return type(typing.get_args(hint)[0])
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _typed(value: Any, hint: Any, where: str) -> Any:
    wanted = _plain_type(hint)
    if value is None and wanted is not hint:
        return None
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is tuple or typing.get_origin(wanted) is tuple:
        return tuple(value)
    if type(value) is not wanted:
        raise ConfigError(f"{where}={value!r} is a {type(value).__name__}; it must be a {wanted.__name__}")
    return value


SMOKE = {
    "model": {
        "vocab_size": 0,
        "hidden_size": 32,
        "num_heads": 2,
        "num_kv_heads": 0,
        "head_dim": 16,
        "mlp_size": 64,
    },
    "data": {"sequence_length": 64, "batch_size": 8},
    "training": {
        "steps": 12,
        "accumulate": 1,
        "log_every": 1,
        "eval_every": 6,
        "optimizer": {"schedule": {"warmup_steps": 2}},
        "mesh": {"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1},
        "checkpoint": {"every": 6},
    },
    "grpo": {
        "group_size": 4,
        "minibatches": 1,
        "overlong_cache": 0,
        "rollout": {"max_prompt_tokens": 16, "max_new_tokens": 8, "min_new_tokens": 0},
    },
    "init_from": "",
    "eval": {"batches": 2, "sample_tokens": 16, "problems": 8, "problem_samples": 4, "pass_at": (1, 4)},
}
"""What the `smoke` form of every config changes, so that it trains in seconds on a CPU."""


def with_variant(config: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
    """`config` itself for variant "", or its smoke form for "smoke" (`--config=FILE:smoke`)."""
    if variant not in ("", "smoke"):
        raise ConfigError(f"config variant {variant!r} is unknown; use FILE or FILE:smoke")
    if variant == "smoke":
        config.update(SMOKE)
        pattern = from_config_dict(config).model.pattern()
        config.model.num_layers = max(len(pattern), 2 if len(set(pattern)) == 1 else 1)
    return config
