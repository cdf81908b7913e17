"""Native Hybrid Attention as a mixer: the shared contract, that every option counts, its cache and its statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.native_hybrid import (
    NativeHybridConfig,
    extend_slots,
    init_slots,
    merge_branches,
    native_hybrid_attention,
    short_convolution,
    slot_branch,
    slot_log_gates,
    slot_mass,
    slot_mass_loss,
    window_branch,
)
from kernels.masks import Mask
from tests.attention.contract import B, C, MixerContract, T, apply, build, decode, inputs, variants


@variants(
    scratch={"window": 5, "slots": 3, "num_heads": 6, "num_kv_heads": 2, "conv_size": 4},
    slots_only={"window": 0, "slots": 4, "value_dim": 7, "learned_slots": True, "slot_feature_map": "swish"},
    converted={"window": 3, "slots": 3, "slot_shift": 6, "style": "converted", "qkv_bias": True, "qk_norm": True,
               "qk_norm_shared": True, "empty_slots": "mask"},
)  # fmt: skip
class TestNativeHybridMixer(MixerContract):
    name = "native_hybrid"
    endless = True

    def test_flops_formula_matches_the_compiler(self, options):
        """Of one decoding step: compilers count the body of a loop once, however often it runs.

        The update of the slots is elementwise there, three operations where the formula counts a product's two.
        """
        options = options | {"head_dim": 128, "slots": 128}
        module, params = build(self.name, implementation="reference", channels=512, **options)
        cache, x = module.init_cache(B, 40), jnp.zeros((B, 1, 512))
        step = jax.jit(lambda p, x, cache: module.apply(p, x, cache, method="step"))
        counted = step.lower(params, x, cache).compile().cost_analysis()["flops"] / B
        keys = module.config.kept + 1 if module.config.window else 0  # the dense form computes every pair
        formula = module.forward_flops(module.config, 512, visible=T)
        seen = min(T, module.config.window)
        formula += (keys - seen) * 2 * module.config.num_heads * (128 + module.config.values)
        assert 1 <= counted / formula < 1.1, f"{counted:.0f} counted, {formula:.0f} by the formula"


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"style": "converted"}, {}),
        ({"window": 3}, {}),
        ({"slots": 7}, {}),
        ({"slot_shift": 0}, {}),
        ({"slot_shift": 9}, {}),
        ({"tau": 1.0}, {}),
        ({"log_gate_min": -0.01}, {}),
        ({"empty_slots": "mask"}, {}),
        ({"learned_slots": True}, {}),
        ({"slot_feature_map": "swish"}, {}),
        ({"value_dim": 4}, {}),
        ({"conv_size": 4}, {}),
        ({"rope_theta": 10.0}, {}),
        ({"qk_norm": True}, {}),
        ({"qk_norm_shared": True}, {"qk_norm": True}),
        ({"qk_norm_eps": 1.0}, {"qk_norm": True}),
        ({"output_norm_eps": 1.0}, {}),
    ],
)
@pytest.mark.thorough
def test_every_option_changes_the_output(changes, base):
    x, small = inputs(), {"window": 5, "slots": 3}
    module, params = build("native_hybrid", **(small | base))
    changed, changed_params = build("native_hybrid", **(small | base | changes))
    shapes = jax.tree.map(jnp.shape, params["params"])
    merged = {
        name: params["params"][name] if shapes.get(name) == jax.tree.map(jnp.shape, own) else own
        for name, own in changed_params["params"].items()
    }
    if changes == {"qk_norm_shared": True}:
        assert merged["query_norm"]["scale"].shape == (10,)
        return
    assert np.abs(apply(changed, {"params": merged}, x) - apply(module, params, x)).max() > 1e-4


def test_a_bias_counts():
    module, params = build("native_hybrid", qkv_bias=True, window=5, slots=3)
    moved = jax.tree.map(lambda p: p, params)
    moved["params"]["key"]["bias"] += 1.0
    assert np.abs(apply(module, moved, inputs()) - apply(module, params, inputs())).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "llama"}, "style='llama' is unknown; choose one of 'scratch', 'converted'"),
        ({"slot_feature_map": "elu"}, "slot_feature_map='elu' is unknown"),
        ({"empty_slots": "drop"}, "empty_slots='drop' is unknown"),
        ({"window": -1}, "window=-1 must be at least 0"),
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"slot_shift": -2}, "slot_shift=-2 must be at least -1"),
        ({"conv_size": 1}, "conv_size=1 mixes no tokens"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"log_gate_min": 0.0}, "log_gate_min=0.0 negative"),
        ({"qk_norm_shared": True}, "no effect with qk_norm=False"),
        ({"style": "converted", "output_norm_eps": 1e-3}, "output_norm_eps=0.001 has no effect"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        NativeHybridConfig(**({"num_heads": 2, "head_dim": 10} | options)).resolve(2, 0, 10, 22)


def test_windows_and_shifts_need_no_other_parameters():
    """The window of a trained layer is free to change: same names, same shapes."""
    shapes = [
        jax.tree.map(jnp.shape, build("native_hybrid", window=w, slot_shift=n, slots=3)[1])
        for w, n in ((0, -1), (5, -1), (64, 0))
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_constant_positions_are_invisible():
    module, params = build("native_hybrid", window=5, slots=3)
    far = apply(module, params, inputs(), positions=1000 + jnp.arange(T)[None])
    np.testing.assert_allclose(far, apply(module, params, inputs()), atol=2e-4)


@pytest.mark.parametrize("prompt", [4, 5, 6])
def test_prompts_around_the_window_then_single_steps(prompt):
    """With empty slots hidden: a cache must know when its first token enters them."""
    module, params = build("native_hybrid", window=5, slots=3, empty_slots="mask")
    got, cache = decode(module, params, inputs(), (prompt,) + (1,) * (T - prompt))
    np.testing.assert_allclose(got, apply(module, params, inputs()), atol=2e-5)
    assert int(cache.length) == T and cache.key.shape[1] == 5


def test_the_cache_holds_raw_keys_and_all_older_tokens_in_slots():
    """Against the operator itself: the kept tokens are the last W, the slots those before."""
    module, params = build("native_hybrid", window=5, slots=3, style="converted")
    x = inputs()
    _, cache = decode(module, params, x, (9, 1, 13), length=2)
    k, v, f = (x @ params["params"][name]["kernel"] for name in ("key", "value", "forget_gate"))
    k, v, g = (y.reshape(B, T, 2, -1) for y in (k, v, slot_log_gates(f)))
    np.testing.assert_allclose(cache.key, k[:, -5:], atol=1e-5)
    np.testing.assert_allclose(cache.log_gates, g[:, -5:], atol=1e-5)
    run = jax.jit(functools.partial(native_hybrid_attention, window=5, return_state=True))
    _, state = run(k, k, v, g)
    np.testing.assert_allclose(cache.key_slots, state.key, atol=1e-5)
    np.testing.assert_allclose(cache.value_slots, state.value, atol=1e-5)


def test_statistics_are_sown():
    """All mass is on the slots without a window; none with a window over everything that hides empty slots."""
    masses, losses = [], []
    for options in ({"window": 0}, {"window": 5}, {"window": T, "empty_slots": "mask"}):
        module, params = build("native_hybrid", slots=3, **options)
        call = jax.jit(functools.partial(module.apply, mutable="intermediates"))
        _, sown = call(params, inputs(), positions=jnp.arange(T)[None])
        masses.append(sown["intermediates"]["slot_mass"][0])
        losses.append(sown["intermediates"]["slot_mass_loss"][0])
    assert masses[0].shape == (B, T, 2)
    assert np.all(masses[0] == 1) and np.all(masses[2] == 0)
    assert np.all((masses[1] > 0) & (masses[1] < 1))
    assert losses[0] == 0 and losses[2] == 0 and losses[1] > 0


def test_slot_mass_loss_is_the_cross_entropy_and_moves_only_the_slots():
    lse = jnp.array([[[0.3, -jnp.inf, 2.0]]]), jnp.array([[[1.0, 0.0, -1.0]]])
    logits = np.array([-0.7, 3.0])
    p = 1 / (1 + np.exp(-logits))
    want = np.mean(-0.25 * np.log(p) - 0.75 * np.log1p(-p))
    np.testing.assert_allclose(slot_mass_loss(*lse, target=0.25), want, rtol=1e-6)
    of_slots, of_window = jax.grad(slot_mass_loss, argnums=(0, 1))(*lse)
    np.testing.assert_allclose(of_slots[0, 0], np.array([p[0] - 1, 0, p[1] - 1]) / 2, rtol=1e-6)
    assert np.all(of_window == 0)
    np.testing.assert_allclose(slot_mass(*lse)[0, 0], [p[0], 0, p[1]], rtol=1e-6)
    assert slot_mass(jnp.full(1, -jnp.inf), jnp.full(1, -jnp.inf)) == 0


def test_branches_merge_to_the_operator():
    q, k, v = (jax.random.normal(jax.random.key(n), (2, 11, h, 6)) for n, h in enumerate((4, 2, 2)))
    g = slot_log_gates(jax.random.normal(jax.random.key(4), (2, 11, 2, 3)))
    mask = Mask(starts=jnp.array([0, 4]))

    @jax.jit
    def both(q, k, v, g):
        joint = native_hybrid_attention(q, k, v, g, window=4, mask=mask, rope_theta=100.0, return_lse=True)
        of_slots = slot_branch(q, k, v, g, slot_shift=4, mask=mask)
        of_window = window_branch(q, k, v, window=4, mask=mask, rope_theta=100.0)
        return joint, merge_branches(*of_slots, *of_window)

    (o, lse), merged = both(q, k, v, g)
    np.testing.assert_allclose(merged[0], o, atol=2e-6)
    np.testing.assert_allclose(merged[1], lse, atol=2e-6)


def test_gates():
    f = jnp.array([0.0, -200.0, 100.0], jnp.bfloat16)
    g = slot_log_gates(f, tau=4.0)
    assert g.dtype == jnp.float32
    np.testing.assert_allclose(g[:2], [np.log(0.5) / 4, -50.0], rtol=1e-6)
    assert -1e-30 < g[2] <= 0
    assert slot_log_gates(f, log_gate_min=-1.0)[1] == -1
    assert jax.grad(lambda f: slot_log_gates(f, log_gate_min=-1.0).sum())(jnp.array([-200.0]))[0] == 0


def test_short_convolution_by_hand():
    x = jnp.arange(1.0, 6.0).reshape(1, 5, 1)
    kernel = jnp.array([[100.0], [10.0], [1.0]])  # the last tap is the current token
    before = jnp.array([[[8.0], [9.0]]])
    own = jnp.array([[1, 1, 1, 1, 1, 2, 0]])
    want = jnp.array([891.0, 912.0, 123.0, 4.0, 0.0])
    np.testing.assert_allclose(short_convolution(x, kernel, before, own)[0, :, 0], jax.nn.silu(want))


def test_bad_calls_of_the_operator_are_refused():
    q, g = jnp.zeros((1, 4, 2, 6)), jnp.zeros((1, 4, 2, 3))
    with pytest.raises(ValueError, match="slot_feature_map='elu' is unknown"):
        native_hybrid_attention(q, q, q, g, window=2, slot_feature_map="elu")
    with pytest.raises(ValueError, match="key_positions are needed for 4 keys and 2 queries"):
        native_hybrid_attention(q[:, :2], q, q, g, window=2, mask=Mask(q_offset=2))
    cache = init_slots(1, 3, 2, 3, 6, 6, jnp.float32)
    with pytest.raises(ValueError, match="a cache of 3 tokens does not serve window=2 and slot_shift=5"):
        extend_slots(cache, q, q, q, g, window=2, slot_shift=5)
    with pytest.raises(ValueError, match="at least one position, got length=0"):
        build("native_hybrid")[0].init_cache(1, 0)


def test_bfloat16_caches_keep_states_and_gates_in_float32():
    module, _ = build("native_hybrid", dtype=jnp.bfloat16, conv_size=4)
    cache = jax.eval_shape(functools.partial(module.init_cache, B, 9))
    kinds = {name: leaf.dtype for name, leaf in vars(cache).items() if hasattr(leaf, "dtype")}
    assert kinds["key"] == kinds["value"] == jnp.bfloat16
    assert kinds["key_slots"] == kinds["value_slots"] == kinds["log_gates"] == jnp.float32
    assert cache.tails[0].shape == (B, 3, 20) and C == 22
