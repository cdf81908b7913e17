"""The tropical mixers of linear time: the shared contract, and that every option counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import tropical_heads, tropical_scan
from attnlab.attention.mixer import find_mixer
from attnlab.attention.tropical_heads import head_slopes
from tests.attention import tropical_plain
from tests.attention.contract import MixerContract, T, apply, build, decode, inputs, variants


@variants(
    plain={},
    grouped={
        "num_heads": 6, "num_kv_heads": 2, "rope": True, "gauge": "lambda", "per_head_trop": True,
        "trop_init": "evt", "decay": "fixed", "output_norm": True,
    },
)  # fmt: skip
class TestTropicalLinearMixer(MixerContract):
    name = "tropical_linear"
    endless = True

    def test_flops_formula_matches_the_compiler(self, options, monkeypatch):
        """Counted on plain maxima of one step: the real ones keep track of winners."""
        monkeypatch.setattr(tropical_scan, "maxplus_linear_attention", tropical_plain.plain_linear_step)
        monkeypatch.setattr(tropical_heads, "map_heads", tropical_plain.plain_map)
        assert 0.99 <= tropical_plain.counted_over_formula(self.name, T, options) < self.flops_excess


@variants(plain={}, normal={"trop_init": "normal", "gauge": "max", "devaluation": "exp", "output_norm": True})
class TestTropicalScanMixer(MixerContract):
    name = "tropical_scan"
    endless = True

    def test_flops_formula_matches_the_compiler(self, options, monkeypatch):
        """Counted on plain maxima of one step: the real ones keep track of winners."""
        monkeypatch.setattr(tropical_scan, "maxplus_scan", tropical_plain.plain_scan_step)
        monkeypatch.setattr(tropical_heads, "map_heads", tropical_plain.plain_map)
        assert 0.99 <= tropical_plain.counted_over_formula(self.name, T, options) < self.flops_excess


SHARED = [
    ({"valuation": "log"}, {}),
    ({"devaluation": "exp"}, {}),
    ({"gauge": "lambda"}, {}),
    ({"gauge": "max"}, {}),
    ({"tropical_proj": False, "trop_init": "identity"}, {"trop_init": "normal"}),
    ({"trop_init": "normal"}, {}),
    ({"trop_init": "evt"}, {}),
    ({"context_clip": 0.1}, {}),
    ({"output_norm": True}, {}),
]
OF_LINEAR = [
    ({"decay": "fixed"}, {}),
    ({"decay": "none"}, {}),
    ({"rope": True}, {}),
    ({"rope_theta": 100.0}, {"rope": True}),
]
OF_SCAN = [({"memory_min": 1.0}, {}), ({"memory_max": 16.0}, {})]
CASES = [("tropical_linear", *case) for case in SHARED + OF_LINEAR]
CASES += [("tropical_scan", *case) for case in SHARED + OF_SCAN]


@pytest.mark.parametrize(("name", "changes", "base"), CASES)
@pytest.mark.thorough
def test_every_option_changes_the_output(name, changes, base):
    module, params = build(name, **base)
    changed, changed_params = build(name, **(base | changes))
    fresh = (
        "decay",
        "value_trop",
        "query_trop",
        "key_trop",
    )  # what the option may have initialised differently
    merged = {k: v if k in fresh else params["params"].get(k, v) for k, v in changed_params["params"].items()}
    assert np.abs(apply(changed, {"params": merged}, inputs()) - apply(module, params, inputs())).max() > 1e-4


def test_without_decay_it_is_tropical_attention_with_the_max_plus_dot_score():
    linear, params = build("tropical_linear", decay="none")
    quadratic, _ = build("tropical", score="maxplus_dot", slope="none")
    np.testing.assert_allclose(apply(linear, params, inputs()), apply(quadratic, params, inputs()), atol=1e-5)


def test_fixed_decay_is_tropical_attention_with_slopes():
    linear, params = build("tropical_linear", decay="fixed")
    quadratic, _ = build("tropical", score="maxplus_dot", slope="alibi")
    np.testing.assert_allclose(apply(linear, params, inputs()), apply(quadratic, params, inputs()), atol=1e-5)
    assert np.all(head_slopes(2) == [2.0**-4, 2.0**-8])


def test_decays_start_at_the_times_asked_for():
    _, params = build("tropical_scan", memory_min=3.0, memory_max=48.0, head_dim=5)
    rate = np.log1p(np.exp(params["params"]["decay"]["bias"])).reshape(2, 5)
    np.testing.assert_allclose(1 / rate, np.tile([3, 6, 12, 24, 48], (2, 1)), rtol=1e-5)
    _, params = build("tropical_linear", num_heads=4)
    rate = np.log1p(np.exp(params["params"]["decay"]["bias"]))
    np.testing.assert_allclose(rate, head_slopes(4), rtol=1e-5)


def test_the_scan_mixer_takes_both_forms_of_the_scan():
    module, params = build("tropical_scan")
    whole, _ = build("tropical_scan", implementation="associative")
    np.testing.assert_allclose(apply(whole, params, inputs()), apply(module, params, inputs()), atol=1e-6)


@pytest.mark.parametrize("name", ["tropical_linear", "tropical_scan"])
def test_states_are_float32_and_do_not_grow(name):
    module, params = build(name, dtype=jnp.bfloat16)
    x = inputs().astype(jnp.bfloat16)
    _, cache = decode(module, params, x, (9, 1, 13))
    assert cache.state.dtype == jnp.float32 and int(cache.length) == T
    sizes = [jax.eval_shape(lambda n=n: module.init_cache(1, n)).state.shape for n in (1, 10_000)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tropical_linear", {"decay": "slow"}, "decay='slow' is unknown"),
        ("tropical_linear", {"head_dim": 7, "rope": True}, "even head_dim, got 7"),
        ("tropical_linear", {"gauge": "mean"}, "gauge='mean' is unknown"),
        ("tropical_scan", {"memory_min": 0.0}, "memory_min=0.0 and memory_max=256.0"),
        ("tropical_scan", {"memory_min": 300.0}, "must satisfy 0 < min <= max"),
        ("tropical_scan", {"num_heads": 4, "num_kv_heads": 2}, "no queries to group, got num_kv_heads=2"),
        ("tropical_scan", {"context_clip": -2.0}, "context_clip=-2.0 must not be negative"),
    ],
)
def test_bad_options_are_refused_with_their_values(name, options, message):
    with pytest.raises(ValueError, match=message):
        find_mixer(name).Config(**({"num_heads": 2, "head_dim": 10} | options)).resolve(2, 0, 10, 22)
