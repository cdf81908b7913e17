"""The presets and the config of the softplus attention paper: sizes, options, recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.config import ConfigError, from_config_dict
from attnlab.models.language_model import LanguageModel
from attnlab.models.presets.softplus import SOFTPLUS_SIZES, SOFTPLUS_VARIANTS, softplus_preset
from configs.softplus import get_config


def parameters(config):
    model = LanguageModel(config)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_the_124m_model_has_the_papers_size():
    """GPT-2 small without position embeddings and biases: 124.4M - 1024 * 768 - 0.1M."""
    projections = 12 * (4 * 768 * 768 + 3 * 768 * 2048)
    norms = (2 * 12 + 1) * 768
    want = 50257 * 768 + projections + norms
    assert parameters(softplus_preset("lssar-p15-124m")) == want == 123_551_232
    assert parameters(softplus_preset("ssmax-124m")) == want + 12 * 12


@pytest.mark.parametrize("variant", SOFTPLUS_VARIANTS)
def test_every_preset_is_a_valid_model_and_they_differ_in_the_mixer_alone(variant):
    forms = set()
    for size in SOFTPLUS_SIZES:
        config = softplus_preset(f"{variant}-{size}", vocab_size=64)
        config.validate()
        ((name, mixer),) = config.layer_configs()
        assert name == "softplus"
        forms.add(mixer.form())
    assert len(forms) == 1
    others = {
        softplus_preset(f"{other}-bytes").mixers["softplus"]
        for other in SOFTPLUS_VARIANTS
        if other != variant
    }
    assert config.mixers["softplus"] not in others


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown preset 'lssar-124m'; choose one of softmax"):
        softplus_preset("lssar-124m")


def test_config_recipes_and_smoke_forms():
    config = from_config_dict(get_config("lssar-p3-124m"))
    assert (
        config.model.mixers["softplus"].power == 3
        and config.data.batch_size * config.data.sequence_length == 524288
    )
    assert config.training.optimizer.schedule.peak == 1.8e-3 and config.training.steps == 18865
    config.validate(8)
    assert get_config("lssa-124m,llmc").training.optimizer.schedule.warmup_steps == 700
    small = from_config_dict(get_config("unit-softmax-bytes"))
    assert small.model.mixers["softplus"].variant == "qknorm_softmax_logdlogn"
    small.validate(1)
    for form in ("smoke", "sigmoid-124m,smoke", "lssa-124m,llmc,smoke", "ssmax-bytes,smoke"):
        from_config_dict(get_config(form)).validate(1)
    with pytest.raises(ConfigError, match="config variant 'smock' is unknown"):
        get_config("lssa-124m,smock")
