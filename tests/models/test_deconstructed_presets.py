"""Models of Deconstructing Attention: equal parameter counts of all kinds, the paper's sizes, and the config file."""

import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from attnlab.config import from_config_dict
from attnlab.models.language_model import LanguageModel
from attnlab.models.presets.deconstructed import KINDS, SIZES, deconstructed_preset
from attnlab.training.trees import named_leaves

# tied and untied, of every kind, with 50,304 tokens
COUNTS = {
    "70m": (50_937_344, 76_692_992),
    "160m": (151_926_528, 190_560_000),
    "500m": (436_037_504, 481_109_888),
    "1.7b": (1_629_873_152, 1_732_895_744),
}
FIXED = tuple(range(5))


def count(config):
    """Trainable parameters: constants are not counted."""
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    leaves = named_leaves(shapes["params"])
    return sum(math.prod(leaf.shape) for name, leaf in leaves.items() if not name.startswith("frozen_"))


def with_text(name, **changes):
    config = deconstructed_preset(name, **changes)
    return deconstructed_preset(
        name, streams=type(config.streams)(length=2048, fixed_tokens=FIXED), **changes
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_have_the_papers_counts(size, kind):
    tied, untied = COUNTS[size]
    if (kind, size) == ("mlp", "1.7b"):
        untied -= 28 * 2 * 128  # it has no queries and keys to norm
    assert count(with_text(f"{kind}-{size}")) == untied
    if kind == "rndemb_qk":
        assert count(with_text(f"{kind}-{size}", tie_embeddings=True)) == tied


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_heads_keep_the_count_up_to_the_rounding_of_the_mlp(kind):
    want = count(with_text("softmax-500m", num_kv_heads=2))
    per_layer = abs(count(with_text(f"{kind}-500m", num_kv_heads=2)) - want) / 24
    assert per_layer == (
        0 if kind != "mlp" else 2 * 384 + 896 - (14 + 2 * 2) * 64
    )  # biases; widths 384, 384, 896


def test_presets_place_layers_and_refuse_unknown_names():
    config = deconstructed_preset("nonapprox-500m", "bilateral")
    assert config.layers == "softmax + nonapprox*22 + softmax"
    assert deconstructed_preset("softmax-70m", "even").layers == "softmax"
    with pytest.raises(ValueError, match="unknown preset 'rndemb-70m'; known: softmax-70m"):
        deconstructed_preset("rndemb-70m")
    with pytest.raises(ValueError, match="layout 'half' is unknown"):
        deconstructed_preset("mlp-70m", "half")


def config_file():
    path = Path(__file__).parents[2] / "configs" / "deconstructed.py"
    spec = importlib.util.spec_from_file_location("deconstructed_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("variant", "layers", "steps"),
    [
        ("rndemb_qk-500m,even", "rndemb_qk + softmax", 28_610),
        ("staticemb_qk-1.7b", "staticemb_qk", 85_830),
        ("smoke", "rndemb_qk + softmax", 12),
        ("approx-160m,25%,smoke", "approx*3 + softmax", 12),
    ],
)
def test_the_config_file(variant, layers, steps):
    experiment = from_config_dict(config_file().get_config(variant))
    experiment.validate(1)
    assert (experiment.model.layers, experiment.training.steps) == (layers, steps)
    assert experiment.model.streams.length == 0
