"""AdamW against its formulas, clipping, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.models.language_model import LanguageModel
from attnlab.models.presets.fox import fox_preset
from attnlab.training.optimizer import OptimizerConfig, decay_mask, make_optimizer
from attnlab.training.schedules import ScheduleConfig
from attnlab.training.trees import named_leaves


def test_two_updates_by_hand():
    config = OptimizerConfig(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=0.0)
    optimizer = make_optimizer(config)
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([3.0])}
    state = optimizer.init(params)
    m = v = 0.0
    for step, gradient in enumerate([0.5, -1.5], start=1):
        grads = {"kernel": jnp.array([gradient]), "bias": jnp.array([gradient])}
        direction, state = optimizer.update(grads, state, params)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        adam = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        np.testing.assert_allclose(direction["kernel"], adam + 0.1 * 2.0, rtol=1e-5)
        np.testing.assert_allclose(direction["bias"], adam, rtol=1e-5)


def test_clipping_scales_the_whole_gradient():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}  # norm 5
    quiet = {"eps": 1e30, "weight_decay": 0.0}  # so that Adam is linear: m / eps
    free = make_optimizer(OptimizerConfig(clip_norm=0.0, **quiet))
    clipped = make_optimizer(OptimizerConfig(clip_norm=1.0, **quiet))
    first, _ = free.update(grads, free.init(grads), grads)
    second, _ = clipped.update(grads, clipped.init(grads), grads)
    np.testing.assert_allclose(second["a"] * 5, first["a"], rtol=1e-5)
    np.testing.assert_allclose(second["b"] * 5, first["b"], rtol=1e-5)


def test_matrices_decay_and_vectors_do_not():
    config = fox_preset("fox-pro-125m")
    params = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))[
        "params"
    ]
    decayed = {
        name for name, value in named_leaves(decay_mask(params, OptimizerConfig().no_decay)).items() if value
    }
    expected = {name for name in named_leaves(params) if not name.endswith(("scale", "bias"))}
    assert decayed == expected and "embedding" in decayed and "head" in decayed
    assert any(name.endswith("forget_gate/kernel") for name in decayed)
    assert not any(name.endswith("forget_gate/bias") for name in decayed)


def test_parameters_called_frozen_are_never_decayed():
    params = {"mixer": {"frozen_query": {"kernel": 1.0}, "query": {"kernel": 1.0}}, "unfrozen_": 1.0}
    assert decay_mask(params, "^nothing$") == {
        "mixer": {"frozen_query": {"kernel": False}, "query": {"kernel": True}},
        "unfrozen_": True,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, "b1=1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"no_decay": "(("}, "is not a regular expression"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(schedule=ScheduleConfig(warmup_steps=1), **options).validate(50)
