"""Softmax attention as a mixer: the shared contract, and that every option counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.softmax import SoftmaxConfig, alibi_slopes, softmax_attention
from tests.attention.contract import MixerContract, T, apply, build, decode, inputs, variants


@variants(
    plain={},
    grouped_normed={"num_heads": 6, "num_kv_heads": 2, "qk_norm": True, "rope": False},
    window={"window": 5, "qk_norm": True, "qk_norm_shared": True, "qkv_bias": True},
    alibi_sink_log_n={"rope": False, "alibi": True, "sink": "learned", "log_n_length": 8, "num_heads": 3},
    adaptive_zero_sink={"adaptive_temperature": True, "sink": "zero"},
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
        ({"alibi": True}, {}),
        ({"log_n_length": 16}, {}),
        ({"sink": "zero"}, {}),
        ({"sink": "learned"}, {}),
        ({"adaptive_temperature": True}, {}),
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
        ({"log_n_length": 1}, "log_n_length=1 must be at least 2"),
        ({"sink": "kitchen"}, "sink='kitchen' is unknown; choose one of 'none', 'zero', 'learned'"),
        ({"alibi": True, "adaptive_temperature": True}, "no form with alibi=True"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxConfig(**({"num_heads": 2, "head_dim": 10} | options)).resolve(2, 0, 10, 22)


def by_equations(q, k, v, *, row_scale=None, slopes=None, sink=None, adaptive=False):
    """The file's equations for causal rows, pair by pair in NumPy."""
    B, T, H, D = q.shape
    o = np.zeros(v.shape)
    for b, i, h in np.ndindex(B, T, H):
        s = np.array([q[b, i, h] @ k[b, j, h] for j in range(i + 1)]) / D**0.5
        s = s if row_scale is None else row_scale[0, i] * s
        s = s if slopes is None else s - slopes[h] * (i - np.arange(i + 1))
        if adaptive:
            p = np.exp(s) / np.exp(s).sum()
            e = -np.sum(p * np.log(p))
            beta = -0.037 * e**4 + 0.481 * e**3 - 2.3 * e**2 + 4.917 * e - 1.791
            s = s * (max(beta, 1) if e > 0.5 else 1)
        z = np.exp(s).sum() + (0 if sink is None else np.exp(sink[h]))
        o[b, i, h] = (np.exp(s) / z) @ v[b, : i + 1, h]
    return o


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_scale": np.log(np.arange(1.0, 14.0))[None]},
        {"slopes": alibi_slopes(3), "sink": np.array([0.3, -1.0, 2.0])},
        {"adaptive": True, "sink": np.zeros(3)},
    ],
    ids=["plain", "row_scale", "alibi_sink", "adaptive_sink"],
)
def test_operator_is_its_equations(options, implementation):
    r = np.random.default_rng(0)
    q, k, v = (r.normal(size=(2, 13, 3, 5)) for _ in range(3))
    with jax.enable_x64(True):
        got = softmax_attention(2 * q, k, v, implementation=implementation, **options)
        np.testing.assert_allclose(got, by_equations(2 * q, k, v, **options), atol=1e-12)


def test_operator_refuses_slopes_with_adaptive_temperature():
    q = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ValueError, match="adaptive=True has no form with slopes"):
        softmax_attention(q, q, q, slopes=jnp.ones(2), adaptive=True)


def test_alibi_slopes_are_the_published_ones():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125])


def test_step_refuses_several_tokens():
    module, params = build("softmax")
    with pytest.raises(ValueError, match="step takes one token, got 3"):
        module.apply(params, jnp.zeros((1, 3, 22)), module.init_cache(1, 4), method="step")
