"""The presets and the config of Native Hybrid Attention: sizes, window layouts and options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.config import from_config_dict
from attnlab.models.language_model import LanguageModel
from attnlab.models.presets.native_hybrid import (
    CONVERTED_SIZES,
    HYBRID_SIZES,
    HYBRID_VARIANTS,
    native_hybrid_preset,
    window_pattern,
)
from configs.native_hybrid import RUNS, get_config


def parameters(config):
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    tree = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)["params"]
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def windows(config):
    return [options.window for _, options in config.layer_configs()] * config.num_periods


def test_sizes_are_those_of_the_published_layers():
    """4 C^2 of projections, C H M of gates, 3 C I of MLP, C for each norm; two tables of 32,000 words."""
    for size, (layers, channels, heads, mlp) in HYBRID_SIZES.items():
        layer = 4 * channels**2 + channels * heads * 64 + 3 * channels * mlp + 3 * channels
        want = 2 * 32_000 * channels + layers * layer + channels
        assert parameters(native_hybrid_preset(f"nha-{size}")) == want
    assert parameters(native_hybrid_preset("nha-llama-3-8b")) == 8_030_261_248 + 32 * 4096 * 8 * 32


def test_windows_of_every_variant():
    assert windows(native_hybrid_preset("nha-340m")) == [32] * 24
    assert windows(native_hybrid_preset("gsa-340m")) == [0] * 24
    assert windows(native_hybrid_preset("nha-hybrid-1.3b")) == ([32] * 7 + [2048]) * 3
    assert windows(native_hybrid_preset("nha-llama-3-8b")) == ([32] * 7 + [2048]) * 4
    assert windows(native_hybrid_preset("nha-qwen2.5-7b")) == ([32] * 6 + [2048]) * 4
    assert {name for name, _ in native_hybrid_preset("transformer-340m").layer_configs()} == {"softmax"}


def test_window_pattern():
    assert window_pattern(16) == "native_hybrid(window=16)"
    assert window_pattern(16, 1) == "native_hybrid(window=2048)"
    assert window_pattern(16, 4, 1, full=99) == (
        "native_hybrid(window=16) + native_hybrid(window=99) + native_hybrid(window=16)*2"
    )
    with pytest.raises(ValueError, match="at=4 is no layer of a group of every=4"):
        window_pattern(16, 4, 4)


NAMES = [f"{v}-{s}" for v in (*HYBRID_VARIANTS, "transformer") for s in HYBRID_SIZES]
NAMES += [f"nha-{model}" for model in CONVERTED_SIZES]


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_and_its_smoke_form_are_valid(name):
    native_hybrid_preset(name).validate()
    for form in (name, f"{name},smoke"):
        from_config_dict(get_config(form))
    config = get_config(name)
    assert config.training.steps == RUNS[name.rpartition("-")[2]][0]
    assert config.data.sequence_length * config.data.batch_size == 524_288


def test_changes_and_unknown_names():
    assert native_hybrid_preset("nha-340m", vocab_size=99).vocab_size == 99
    with pytest.raises(ValueError, match="unknown preset 'nha-7m'; known: nha-340m"):
        native_hybrid_preset("nha-7m")
    assert get_config("smoke").model.layers == "native_hybrid(window=32)"
