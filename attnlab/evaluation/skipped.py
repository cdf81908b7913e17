"""How well a hybrid predicts without its replaced layers: they become the identity, mixer and MLP, with no retraining.

The "skip" evaluation of Deconstructing Attention (arXiv 2510.11602, section 4): what is left are the layers whose
mixer is softmax attention. Everything else is as in `held_out`, and compared with it on the same text.
"""

import dataclasses
from typing import Any

import jax

from attnlab.evaluation import held_out
from attnlab.evaluation.config import EvalConfig
from attnlab.evaluation.evaluator import Context, Result
from attnlab.models.config import ModelConfig
from attnlab.objectives.language_modelling import LanguageModelling

KEPT = ("softmax",)


@dataclasses.dataclass(frozen=True)
class SkippedLanguageModelling(LanguageModelling):
    """The objective of the same model without some of its layers (numbered from 1)."""

    drop_layers: tuple[int, ...] = ()

    def inputs(self, batch: dict[str, jax.Array]) -> dict[str, Any]:
        return super().inputs(batch) | {"drop_layers": self.drop_layers}


def replaced_layers(model: ModelConfig, kept: tuple[str, ...] = KEPT) -> tuple[int, ...]:
    """Numbers (from 1) of the layers whose mixer is not in `kept`."""
    names = [name for name, _ in model.layer_configs()] * model.num_periods
    return tuple(number for number, name in enumerate(names, start=1) if name not in kept)


def run(context: Context, config: EvalConfig) -> Result:
    """Scalars and rows of `held_out` without the replaced layers, and dropped_layers, their number.

    loss_increase is what dropping them costs, in nats a token. ValueError if no layer is replaced, or all are.
    """
    objective = context.objective
    dropped = replaced_layers(objective.model)
    if len(dropped) in (0, objective.model.num_layers):
        found = "every" if dropped else "no"
        raise ValueError(
            f"{found} layer of {objective.model.layers!r} would be dropped; this evaluates hybrids of "
            f"{' or '.join(KEPT)} with something else"
        )
    fields = {field.name: getattr(objective, field.name) for field in dataclasses.fields(LanguageModelling)}
    skipped = SkippedLanguageModelling(**fields, drop_layers=dropped)
    result = held_out.run(dataclasses.replace(context, objective=skipped), config)
    whole = held_out.run(context, config)
    scalars = result.scalars | {
        "whole_loss": whole.scalars["loss"],
        "loss_increase": result.scalars["loss"] - whole.scalars["loss"],
        "dropped_layers": float(len(dropped)),
    }
    return dataclasses.replace(result, scalars=scalars)
