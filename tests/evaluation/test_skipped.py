"""A hybrid without its replaced layers is the model of the others; nothing else about it changes."""

import dataclasses

import jax
import numpy as np
import pytest

from attnlab.evaluation import run
from attnlab.evaluation.skipped import replaced_layers
from attnlab.models.config import ModelConfig
from attnlab.objectives.language_modelling import LanguageModelling, LanguageModellingConfig
from tests.evaluation import small

TEXTS = small.documents([5, 15, 1, 9, 14])
DENSE = "(implementation='reference')"


def hybrid(layers: str, num_layers: int, **changes) -> ModelConfig:
    return dataclasses.replace(small.model_config(), layers=layers, num_layers=num_layers, **changes)


def context(model: ModelConfig, params=None):
    objective = LanguageModelling(model, LanguageModellingConfig(), 16)
    params = jax.jit(objective.init)(jax.random.key(0)) if params is None else params
    base = small.context(TEXTS)
    experiment = dataclasses.replace(base.experiment, model=model)
    return dataclasses.replace(base, experiment=experiment, objective=objective, params=params)


def test_it_is_the_model_of_the_kept_layers():
    whole = context(hybrid(f"forgetting{DENSE} + softmax{DENSE}", 4, scan_layers=True))
    blocks = whole.params["layers"]["blocks_1"]
    rest = {name: x for name, x in whole.params.items() if name != "layers"}
    kept = context(hybrid(f"softmax{DENSE}", 2, scan_layers=True), rest | {"layers": {"blocks_0": blocks}})
    result, want, full = run("skipped", whole), run("held_out", kept), run("held_out", whole)
    for name, value in want.scalars.items():
        np.testing.assert_allclose(result.scalars[name], value, rtol=1e-6, err_msg=name)
    assert result.scalars["dropped_layers"] == 2
    assert result.scalars["whole_loss"] == full.scalars["loss"]
    np.testing.assert_allclose(
        result.scalars["loss_increase"], want.scalars["loss"] - full.scalars["loss"], atol=1e-6
    )
    assert abs(result.scalars["loss_increase"]) > 1e-4
    assert [row.keys() for row in result.rows] == [row.keys() for row in want.rows]


def test_layers_are_counted_through_all_periods():
    assert replaced_layers(hybrid("forgetting*2 + softmax", 6)) == (1, 2, 4, 5)


@pytest.mark.parametrize(("layers", "found"), [("forgetting", "every"), ("softmax", "no")])
def test_only_hybrids_can_be_skipped(layers, found):
    with pytest.raises(ValueError, match=f"{found} layer of .{layers}.* would be dropped"):
        run("skipped", context(hybrid(layers + DENSE, 1)))
