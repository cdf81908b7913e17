"""Importing published weights (the golden checker compares what they compute): what is refused."""

import dataclasses

import numpy as np
import pytest

from attnlab.attention.forgetting import ForgettingConfig
from attnlab.models.config import ModelConfig
from attnlab.models.fox_weights import attention_params, model_params


def test_unknown_published_names_are_refused():
    with pytest.raises(ValueError, match=r"'rotary.inv_freq' is not a weight"):
        attention_params({"rotary.inv_freq": np.zeros(3)}, ForgettingConfig(head_dim=4))


def test_missing_layers_and_other_mixers_are_refused():
    weights = {"model.embeddings.weight": np.zeros((3, 8))}
    with pytest.raises(ValueError, match=r"no model.layers.0"):
        model_params(weights, ModelConfig(num_layers=1, hidden_size=8, num_heads=2))
    config = dataclasses.replace(ModelConfig(), layers="softmax")
    with pytest.raises(ValueError, match="have forgetting layers only, not 'softmax'"):
        model_params(weights, config)


def test_head_norms_are_split_or_shared_by_their_shape():
    weights = {"q_norm.weight": np.arange(8.0), "k_norm.weight": np.arange(4.0)}
    params = attention_params(weights, ForgettingConfig(head_dim=4))
    np.testing.assert_array_equal(params["query_norm"]["scale"], np.arange(8.0).reshape(2, 4))
    np.testing.assert_array_equal(params["key_norm"]["scale"], np.arange(4.0))
