"""The controls without tables: the shared contract, their options, and what makes each a control."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.attention import position_mixing, synthesizer  # noqa: F401 (registers their mixers)
from attnlab.attention.controls import aft_simple, uniform_attention
from attnlab.attention.mixer import find_mixer
from attnlab.training.trees import named_leaves
from tests.attention.contract import C, MixerContract, T, apply, build, inputs, variants


class FrozenContract(MixerContract):
    """The contract where parameters called frozen_* are constants."""

    def test_padding_gradients_are_zero_and_all_are_finite(self, options):
        module, params = build(self.name, **options)
        starts = jnp.array([0, 4, T])  # the last row is all padding
        x, real = inputs(), (jnp.arange(T)[None] >= starts[:, None])[..., None]

        def loss(params, x):
            y = module.apply(params, x, positions=jnp.arange(T)[None] - starts[:, None], starts=starts)
            return jnp.sum(jnp.where(real, jnp.sin(y), 0))

        of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
        for name, gradient in named_leaves(of_params).items():
            assert np.all(np.isfinite(gradient)), name
            assert np.any(gradient != 0) != ("frozen_" in name), name
        assert np.all(np.where(real, 0, of_x) == 0) and np.all(np.isfinite(of_x)) and np.any(of_x != 0)


class LightContract(FrozenContract):
    """Without what a mixer shares with a close relative that has the whole contract."""

    test_repeated_mapped_rematerialised_and_exported_are_the_same = None
    test_any_split_of_any_length_is_the_same = None


@variants(plain={})
class TestIdentity(MixerContract):
    name, endless = "identity", True

    def test_causality_and_isolation_by_exact_zeros(self, options):
        module, params = build(self.name, **options)
        y, pull = jax.vjp(lambda x: apply(module, params, x), inputs())
        assert y.shape == inputs().shape and not y.any() and not pull(jnp.ones_like(y))[0].any()

    def test_padding_gradients_are_zero_and_all_are_finite(self, options):
        _, params = build(self.name, **options)
        assert named_leaves(params) == {}

    def test_outputs_and_every_gradient_match_the_reference_in_float64(self, options):
        with jax.enable_x64(True):
            module, params = build(self.name, dtype=jnp.float64, **options)
            y = apply(module, params, inputs().astype(jnp.float64))
            assert y.dtype == jnp.float64 and not y.any()

    def test_bfloat16_stays_close(self, options):
        module, params = build(self.name, dtype=jnp.bfloat16, **options)
        assert apply(module, params, inputs().astype(jnp.bfloat16)).dtype == jnp.bfloat16

    def test_a_named_implementation_is_taken_or_refused_in_every_form(self, options):
        with pytest.raises(ValueError, match="implementation='abacus' does not exist for identity"):
            build(self.name, implementation="abacus", **options)

    def test_flops_formula_matches_the_compiler(self, options):
        module, _ = build(self.name, **options)
        assert module.forward_flops(module.config, C, visible=T) == 0


@variants(grouped={"num_heads": 6, "num_kv_heads": 2})
class TestUniform(LightContract):
    name, endless = "uniform", True


@variants(plain={})
class TestAFTSimple(MixerContract):
    name, endless = "aft_simple", True
    flops_excess = 1.2  # single channels: elementwise work counts


@variants(grouped={"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "qkv_bias": True})
class TestFrozenQK(LightContract):
    name = "frozen_qk"


def test_uniform_is_a_running_mean_of_its_document():
    v = inputs().reshape(3, T, 2, 11)
    count = jnp.arange(1, T + 1)[:, None, None]
    np.testing.assert_allclose(uniform_attention(v), jnp.cumsum(v, 1) / count, atol=1e-6)


def test_aft_gates_by_the_sigmoid_of_its_queries_and_ignores_a_shift_of_keys():
    q, k, v = (inputs(seed=n) for n in range(3))
    y = aft_simple(q, k, v)
    half = aft_simple(jnp.zeros_like(q), k, v)
    np.testing.assert_allclose(y, 2 * jax.nn.sigmoid(q) * half, atol=1e-6)
    np.testing.assert_allclose(aft_simple(q, k + 4.0, v), y, atol=1e-5)
    weights = jax.nn.softmax(k[:, :9], axis=1)
    np.testing.assert_allclose(2 * half[:, 8], jnp.sum(weights * v[:, :9], axis=1), atol=1e-5)


def test_frozen_qk_is_softmax_of_the_same_weights_whose_input_still_learns_through_its_map():
    frozen, params = build("frozen_qk", qkv_bias=True)
    plain, _ = build("softmax", qkv_bias=True)
    names = {"params": {name.replace("frozen_", ""): x for name, x in params["params"].items()}}

    def with_gradient(module, params, x):
        def loss(x):
            y = module.apply(params, x, positions=jnp.arange(T)[None])
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, has_aux=True)(x)

    both = jax.jit(lambda x: (with_gradient(frozen, params, x), with_gradient(plain, names, x)))
    got, want = both(inputs())
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("frozen_qk", {"qkv_bias": True}),
        ("mixit", {"max_length": 23}),
    ],
)
def test_optimiser_steps_with_weight_decay_leave_frozen_parameters_alone(name, options):
    """Gradients of what is frozen are zero; decay is masked by the name."""
    module, params = build(name, **options)
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, _: "frozen_" not in jax.tree_util.keystr(path), params
    )
    optimiser = optax.adamw(1e-2, weight_decay=0.1, mask=decayed)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: jnp.sum(jnp.sin(apply(module, p, inputs()))))(params)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    new, state = params, optimiser.init(params)
    for _ in range(3):
        new, state = step(new, state)
    frozen = 0
    for leaf, x in named_leaves(params).items():
        same = np.array_equal(named_leaves(new)[leaf], x)
        assert same == ("frozen_" in leaf), leaf
        frozen += same
    assert frozen


def test_qkv_bias_adds_biases_that_count():
    module, params = build("aft_simple", qkv_bias=True)

    def shift(path, x):
        return x + 0.5 * jnp.cos(jnp.arange(x.size)) if "bias" in jax.tree_util.keystr(path) else x

    shifted = jax.tree_util.tree_map_with_path(shift, params)
    assert np.abs(apply(module, shifted, inputs()) - apply(module, params, inputs())).max() > 1e-3
    assert sum("bias" in leaf for leaf in named_leaves(params)) == 3
    for name, count in (("uniform", 1), ("frozen_qk", 3)):
        assert sum("bias" in leaf for leaf in named_leaves(build(name, qkv_bias=True)[1])) == count
        assert not any("bias" in leaf for leaf in named_leaves(build(name)[1]))


def test_a_prefix_state_does_not_grow():
    for name in ("uniform", "aft_simple"):
        module, _ = build(name)
        short, long = module.init_cache(1, 8), module.init_cache(1, 10_000)
        assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)


@pytest.mark.parametrize("name", ["identity", "aft_simple", "fnet"])
def test_key_value_heads_are_refused_where_there_are_none_but_other_layers_may_have_them(name):
    config = find_mixer(name).Config
    with pytest.raises(ValueError, match="num_kv_heads=2 means nothing to a mixer without key/value heads"):
        config(num_kv_heads=2).resolve(4, 4, 8, 32)
    assert config().resolve(4, 2, 8, 32).num_kv_heads == 4
    assert config().resolve(4, 2, 8, 32).resolve(4, 2, 8, 32).num_kv_heads == 4
