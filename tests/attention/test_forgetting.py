"""The FoX layer: the shared contract on its variants, its gates and shift, and that every option counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.forgetting import PRO, ForgettingConfig, log_forget_gate, log_spaced_bias, token_shift
from tests.attention.contract import MixerContract, apply, build, inputs, variants


@variants(
    plain={},
    pro=PRO,
    pro_rope_grouped_window=PRO | {"rope": True, "num_heads": 6, "num_kv_heads": 2, "window": 6},
    bias_only={"gate": "bias_only", "gate_log_spaced": True, "output_gate": "silu", "value_shift": True},
    no_gate_shared_norm={"gate": "none", "rope": True, "qk_norm": True, "qk_norm_shared": True},
)
class TestForgettingMixer(MixerContract):
    name = "forgetting"


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"gate": "fixed"}, {}),
        ({"gate": "bias_only"}, {}),
        ({"gate": "none"}, {}),
        ({"gate_log_spaced": True}, {"gate": "bias_only"}),
        ({"gate_time_min": 1.0}, {"gate": "fixed"}),
        ({"gate_time_max": 3.0}, {"gate": "fixed"}),
        ({"log_f_min": -0.1}, {}),
        ({"qk_norm": True}, {}),
        ({"qk_norm_eps": 1.0}, {"qk_norm": True}),
        ({"key_shift": True}, {}),
        ({"value_shift": True}, {}),
        ({"output_norm": True}, {}),
        ({"output_gate": "sigmoid"}, {}),
        ({"output_gate": "silu"}, {"output_gate": "sigmoid"}),
        ({"rope": True}, {}),
        ({"rope_theta": 10.0}, {"rope": True}),
        ({"window": 3}, {}),
    ],
)
def test_every_option_changes_the_output(changes, base):
    x = inputs()
    module, params = build("forgetting", **base)
    changed, new = build("forgetting", **(base | changes))
    kept = {name: params["params"].get(name, value) for name, value in new["params"].items()}
    if "gate_log_spaced" in changes:
        kept = new["params"]  # the option is about the initial value
    assert np.abs(apply(changed, {"params": kept}, x) - apply(module, params, x)).max() > 1e-4


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}])
def test_pruning_is_harmless_when_safe_and_felt_when_not(options):
    """A slow gate (log f = -0.015) and small scores: far keys are light, but not nothing."""
    x = inputs(length=1100, batch=1)
    module, params = build("forgetting", **options)
    params = jax.tree.map(lambda leaf: leaf, params)
    weights = params["params"]
    weights["forget_gate"] = {"kernel": jnp.zeros((22, 2)), "bias": jnp.full(2, 4.19)}
    small = ("query_norm", "scale") if options else ("query", "kernel")
    weights[small[0]][small[1]] *= 0.01
    want = apply(module, params, x)
    safe, _ = build("forgetting", pruning=True, **options)
    np.testing.assert_allclose(apply(safe, params, x), want, atol=1e-5)
    hasty, _ = build("forgetting", pruning=True, log_pruning_tolerance=0.0, **options)
    assert np.abs(apply(hasty, params, x) - want).max() > 1e-5


def test_log_gate_is_accurate_and_clamped():
    logits = jnp.array([-100.0, -2.0, 0.0, 30.0])
    np.testing.assert_allclose(log_forget_gate(logits), [-100, -2.126928, -0.693147, -9.357e-14], rtol=1e-4)
    np.testing.assert_allclose(log_forget_gate(logits, -3.0)[0], -3.0)
    assert log_forget_gate(logits.astype(jnp.bfloat16)).dtype == jnp.float32


def test_log_spaced_gates_are_alibi():
    """Eight heads from 2 to 256 tokens have ALiBi's slopes 2^-1 .. 2^-8."""
    with jax.enable_x64(True):
        log_f = log_forget_gate(jnp.asarray(log_spaced_bias(8, 2.0, 256.0)))
        np.testing.assert_allclose(log_f, -(2.0 ** -np.arange(1, 9)), rtol=1e-12)


def test_token_shift_by_hand():
    current = jnp.arange(6.0).reshape(1, 3, 2, 1)  # tokens (0, 1), (2, 3), (4, 5)
    before = jnp.full((1, 2, 1), 10.0)
    alpha = jnp.broadcast_to(jnp.array([1.0, 0.25]), (1, 3, 2))
    has_previous = jnp.array([[True, True, False]])
    shifted = token_shift(current, alpha, before, has_previous)[0, ..., 0]
    np.testing.assert_allclose(shifted, [[10, 0.25 * 10 + 0.75 * 1], [0, 0.25 * 1 + 0.75 * 3], [0, 0.75 * 5]])


def test_gate_log_probability_path_stays_float32():
    module, params = build("forgetting", dtype=jnp.bfloat16)
    _, state = module.apply(
        params,
        inputs().astype(jnp.bfloat16),
        positions=jnp.zeros((1, 23), jnp.int32),
        mutable=["intermediates"],
    )
    assert state["intermediates"]["log_f"][0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "ful"}, "gate='ful' is unknown"),
        ({"output_gate": "silu", "output_norm": True}, "output_gate='silu' goes with output_norm=False only"),
        ({"gate_time_min": 9.0, "gate_time_max": 3.0}, "got 9.0 and 3.0"),
        ({"decay_mode": "exact"}, "decay_mode='exact' is unknown"),
        ({"pruning": True, "gate": "none"}, "pruning=True needs a forget gate"),
        ({"gate_log_spaced": True}, "no effect with gate='full'"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        ForgettingConfig(**({"num_heads": 2, "head_dim": 10} | options)).resolve(2, 0, 10, 22)
