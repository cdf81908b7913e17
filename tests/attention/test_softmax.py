"""Softmax attention as a mixer: the shared contract, and that every option counts."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.softmax import SoftmaxConfig
from tests.attention.contract import MixerContract, T, apply, build, decode, inputs, variants


@variants(
    plain={},
    grouped_normed={"num_heads": 6, "num_kv_heads": 2, "qk_norm": True, "rope": False},
    window={"window": 5, "qk_norm": True, "qk_norm_shared": True},
)
class TestSoftmaxMixer(MixerContract):
    name = "softmax"


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"rope": False}, {}),
        ({"rope_theta": 100.0}, {}),
        ({"qk_norm": True}, {}),
        ({"qk_norm_eps": 1.0}, {"qk_norm": True}),
        ({"window": 4}, {}),
    ],
)
def test_every_option_changes_the_output(changes, base):
    x = inputs()
    module, params = build("softmax", **base)
    changed, changed_params = build("softmax", **(base | changes))
    merged = {"params": changed_params["params"] | params["params"]}
    merged["params"] = {k: v for k, v in merged["params"].items() if k in changed_params["params"]}
    assert np.abs(apply(changed, merged, x) - apply(module, params, x)).max() > 1e-4


def test_shared_norm_weights_have_the_shape_of_one_head():
    _, params = build("softmax", qk_norm=True, qk_norm_shared=True)
    assert params["params"]["query_norm"]["scale"].shape == (10,)


def test_window_cache_holds_only_the_window():
    module, params = build("softmax", window=4)
    _, cache = decode(module, params, inputs(), (5,) + (1,) * (T - 5), length=10_000)
    assert cache.key.shape[1] == 4 and int(cache.length) == T


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads=3 is not a multiple of num_kv_heads=2"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"window": -1}, "window=-1 is negative"),
        ({"qk_norm_shared": True}, "no effect with qk_norm=False"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxConfig(**({"num_heads": 2, "head_dim": 10} | options)).resolve(2, 0, 10, 22)


def test_step_refuses_several_tokens():
    module, params = build("softmax")
    with pytest.raises(ValueError, match="step takes one token, got 3"):
        module.apply(params, jnp.zeros((1, 3, 22)), module.init_cache(1, 4), method="step")
