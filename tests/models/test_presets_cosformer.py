"""The presets and the config of cosFormer: sizes and options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.config import from_config_dict
from attnlab.models.language_model import LanguageModel
from attnlab.models.presets.cosformer import COSFORMER_SIZES, COSFORMER_VARIANTS, cosformer_preset
from configs.cosformer import get_config


def parameters(config):
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    tree = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)["params"]
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_sizes_are_the_published_ones():
    """50,265 words of 512 and six layers of 12 C^2 are the printed 44.65 million."""
    attention, mlp = 4 * 512 * 512 + 4 * 512, 3 * 512 * 1365
    base = 50_265 * 512 + 6 * (attention + mlp + 2 * 512) + 512
    assert parameters(cosformer_preset("cosformer-base")) == base == 44_625_920
    assert abs(base - 44.65e6) < 0.03e6
    without_out = attention - 512 * 512 - 512
    assert (
        parameters(cosformer_preset("relu-base-h1-l7")) == base + (without_out + mlp + 1024) - 6 * 512 * 513
    )
    biases = 6 * 4 * 512
    assert parameters(cosformer_preset("softmax-base")) == base - biases
    assert parameters(cosformer_preset("cosformer-norm-12-layers")) == 50_265 * 1024 + 12 * (
        4 * 1024 * 1025 + 3 * 1024 * 2731 + 2048
    ) + 1024  # fmt: skip


@pytest.mark.parametrize("variant", COSFORMER_VARIANTS)
def test_every_preset_is_valid_and_its_longest_length_is_that_of_training(variant):
    for size, (_, _, heads, length, _) in COSFORMER_SIZES.items():
        config = cosformer_preset(f"{variant}-{size}", vocab_size=64)
        config.validate()
        ((name, mixer),) = config.layer_configs()
        assert mixer.num_heads == heads
        if variant == "softmax":
            assert name == "softmax" and not mixer.rope
        else:
            assert name == "cosformer" and mixer.max_length == length
            assert mixer.out_proj == (size != "base-h1-l7")
    others = {str(cosformer_preset(f"{other}-bytes")) for other in COSFORMER_VARIANTS if other != variant}
    assert str(cosformer_preset(f"{variant}-bytes")) not in others


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown preset 'cosformer-huge'; choose one of cosformer, relu"):
        cosformer_preset("cosformer-huge")


def test_config_recipes_and_smoke_forms():
    config = from_config_dict(get_config())
    assert config.data.sequence_length * config.data.batch_size == 65_536
    assert config.training.optimizer.schedule.peak == 5e-4 and config.training.steps == 100_000
    small = from_config_dict(get_config("elu1-bytes"))
    assert small.model.mixers["cosformer"].max_length == small.data.sequence_length == 128
    smoke = from_config_dict(get_config("smoke"))
    assert smoke.model.hidden_size < 512 and smoke.data.sequence_length <= 512
    assert smoke.model.mixers["cosformer"].max_length == 512
