"""Layers laid out one by one compute what scanned ones do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.models.config import ModelConfig
from attnlab.models.language_model import LanguageModel
from attnlab.models.unrolled import unrolled

SIZES = {"hidden_size": 16, "num_heads": 2, "mlp_size": 16, "vocab_size": 11}


@pytest.mark.parametrize("layers, depth", [("forgetting", 3), ("softmax + inverse_distance", 4)])
def test_the_logits_are_the_same(layers, depth):
    model = LanguageModel(ModelConfig(layers=layers, num_layers=depth, **SIZES))
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)
    params = model.init(jax.random.key(0), tokens)["params"]
    other, laid_out = unrolled(model, params)
    assert not other.config.scan_layers
    shapes = jax.eval_shape(lambda: other.init(jax.random.key(0), tokens))["params"]
    assert jax.tree.map(lambda x: x.shape, laid_out) == jax.tree.map(lambda x: x.shape, shapes)
    want, got = (m.apply({"params": p}, tokens) for m, p in ((model, params), (other, laid_out)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert jnp.abs(want).max() > 0
    assert unrolled(other, laid_out) == (other, laid_out)
