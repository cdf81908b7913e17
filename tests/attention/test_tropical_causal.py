"""Causal tropical attention as a mixer: the shared contract, and that every option counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import tropical_causal, tropical_heads
from attnlab.attention.tropical_causal import TropicalConfig
from attnlab.attention.tropical_heads import head_slopes, inverse_softplus
from tests.attention import tropical_plain
from tests.attention.contract import MixerContract, T, apply, build, decode, inputs, variants


@variants(
    plain={},
    grouped={
        "num_heads": 6, "num_kv_heads": 2, "rope": True, "gauge": "lambda", "per_head_trop": True,
        "trop_init": "evt", "slope": "learned", "score": "maxplus_dot",
    },
    window_mixed={"window": 5, "num_heads": 3, "softmax_heads": 1, "gauge": "max", "score": "hilbert_asym"},
    smooth={"smooth_beta": 3.0, "slope": "none", "tropical_proj": False, "output_norm": True},
)  # fmt: skip
class TestTropicalMixer(MixerContract):
    name = "tropical"

    def test_flops_formula_matches_the_compiler(self, options, monkeypatch):
        """Counted on plain maxima: the real ones keep track of winners, which is no arithmetic of the method.

        A maximum of n takes n - 1 comparisons and counts as n."""
        monkeypatch.setattr(tropical_causal, "tropical_attention", tropical_plain.plain_attention)
        monkeypatch.setattr(tropical_heads, "map_heads", tropical_plain.plain_map)
        options = options | ({"implementation": "reference"} if options.get("softmax_heads") else {})
        assert 0.99 <= tropical_plain.counted_over_formula(self.name, T, options) < self.flops_excess


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"valuation": "log"}, {}),
        ({"devaluation": "exp"}, {}),
        ({"gauge": "lambda"}, {}),
        ({"gauge": "max"}, {}),
        ({"tropical_proj": False, "trop_init": "identity"}, {"trop_init": "normal"}),
        ({"trop_init": "normal"}, {}),
        ({"trop_init": "evt"}, {}),
        ({"context_clip": 0.1}, {}),
        ({"output_norm": True}, {}),
        ({"rope": True}, {}),
        ({"rope_theta": 100.0}, {"rope": True}),
        ({"score": "hilbert_asym"}, {}),
        ({"score": "maxplus_dot"}, {}),
        ({"score": "lse_dot"}, {}),
        ({"score_scale": 3.0}, {}),
        ({"smooth_beta": 2.0}, {}),
        ({"slope": "none"}, {}),
        ({"window": 2}, {"slope": "none"}),
        ({"softmax_heads": 1}, {}),
    ],
)
@pytest.mark.thorough
def test_every_option_changes_the_output(changes, base):
    module, params = build("tropical", **base)
    changed, changed_params = build("tropical", **(base | changes))
    keep = {} if "trop_init" in changes else params["params"]
    merged = {
        k: keep.get(k, v) if np.shape(keep.get(k)) == np.shape(v) else v
        for k, v in changed_params["params"].items()
    }
    merged |= {k: params["params"][k] for k in ("query", "key", "value", "out")}
    assert np.abs(apply(changed, {"params": merged}, inputs()) - apply(module, params, inputs())).max() > 1e-4


def test_learned_slopes_start_as_fixed_ones_and_heads_may_have_maps_of_their_own():
    module, params = build("tropical")
    learned, learned_params = build("tropical", slope="learned")
    np.testing.assert_allclose(
        apply(learned, learned_params, inputs()), apply(module, params, inputs()), atol=1e-5
    )
    np.testing.assert_allclose(np.log1p(np.exp(inverse_softplus(head_slopes(8)))), head_slopes(8), rtol=1e-12)
    np.testing.assert_array_equal(head_slopes(8)[[0, 7]], [0.5, 2.0**-8])
    _, params = build("tropical", per_head_trop=True, num_heads=6, num_kv_heads=2)
    shapes = {name: x.shape for name, x in params["params"].items() if name.endswith("trop")}
    assert shapes == {"query_trop": (6, 10, 10), "key_trop": (2, 10, 10), "value_trop": (2, 10, 10)}


def test_the_cache_is_float32_unless_asked_otherwise():
    for options, dtype in (({}, jnp.float32), ({"cache_dtype": "bfloat16"}, jnp.bfloat16)):
        module, params = build("tropical", dtype=jnp.bfloat16, **options)
        x = inputs().astype(jnp.bfloat16)
        y, cache = decode(module, params, x, (9, 1, 13))
        assert cache.key.dtype == cache.value.dtype == dtype and y.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            *(np.asarray(a, np.float32) for a in (y, apply(module, params, x))), atol=0.2
        )


def test_window_cache_holds_only_the_window():
    module, params = build("tropical", window=4)
    y, cache = decode(module, params, inputs(), (5,) + (1,) * (T - 5), length=10_000)
    assert cache.key.shape[1] == 4 and int(cache.length) == T
    np.testing.assert_allclose(y, apply(module, params, inputs()), atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads=3 is not a multiple of num_kv_heads=2"),
        ({"head_dim": 7, "rope": True}, "even head_dim, got 7"),
        ({"window": -1}, "window=-1 is negative"),
        ({"score": "cosine"}, "score='cosine' is unknown"),
        ({"gauge": "mean"}, "gauge='mean' is unknown"),
        ({"valuation": "sqrt"}, "valuation='sqrt' is unknown"),
        ({"devaluation": "none"}, "devaluation='none' is unknown"),
        ({"trop_init": "zeros"}, "trop_init='zeros' is unknown"),
        ({"slope": "steep"}, "slope='steep' is unknown"),
        ({"cache_dtype": "int8"}, "cache_dtype='int8' is unknown"),
        ({"smooth_beta": -1.0}, "smooth_beta=-1.0 and context_clip=15.0 must not be negative"),
        ({"context_clip": -1.0}, "context_clip=-1.0 must not be negative"),
        ({"smooth_beta": 1.0, "score": "lse_dot"}, "no effect with score='lse_dot'"),
        ({"per_head_trop": True, "tropical_proj": False}, "no effect with tropical_proj=False"),
        ({"trop_init": "evt", "tropical_proj": False}, "no effect with tropical_proj=False"),
        ({"num_heads": 6, "num_kv_heads": 2, "softmax_heads": 2}, "softmax_heads=2 must be a multiple of 3"),
        ({"softmax_heads": 2}, "below num_heads=2"),
        ({"num_heads": 4, "softmax_heads": 2, "output_norm": True}, "softmax_heads=0 only"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        TropicalConfig(**({"num_heads": 2, "head_dim": 10} | options)).resolve(2, 0, 10, 22)


def test_softmax_heads_are_softmax_heads():
    """With tropical norms at zero, only the softmax heads are left, and they are those of the softmax mixer."""
    module, params = build("tropical", num_heads=3, softmax_heads=1, rope=True)
    p = dict(params["params"])
    p["tropical_norm"] = jax.tree.map(jnp.zeros_like, p["tropical_norm"])
    soft, _ = build("softmax", num_heads=1, rope=True)
    last = {name: {"kernel": p[name]["kernel"][:, 20:]} for name in ("query", "key", "value")}
    identity = {"kernel": jnp.eye(10)}
    wide = soft.clone(hidden_size=10)
    o = wide.apply({"params": last | {"out": identity}}, inputs(), positions=jnp.arange(T)[None])
    want = (o * jax.lax.rsqrt(jnp.mean(o**2, -1, keepdims=True) + 1e-6)) @ p["out"]["kernel"][20:]
    np.testing.assert_allclose(apply(module, {"params": p}, inputs()), want, atol=2e-5)
