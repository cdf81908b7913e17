"""The kinds of Deconstructing Attention as mixers: the shared contract, their options, and the paper's properties.

Letters: B batch, T length, R rows of a source, H heads, D head size.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attnlab.attention.deconstructed import (
    MLPMixerConfig,
    NonApproxConfig,
    nonapprox_attention,
    prefix_logits,
)
from attnlab.attention.rotary import rotate
from attnlab.attention.softmax import softmax_attention
from attnlab.attention.sourced import StaticEmbeddingConfig, shared_qk_attention, take_rows
from attnlab.attention.taylor import (
    FORMS,
    ApproxConfig,
    away_from_zero,
    read_taylor_state,
    taylor_attention,
    taylor_state,
)
from attnlab.training.sharding import MeshConfig, make_mesh
from kernels.masks import Mask
from tests.attention.contract import B, C, MixerContract, T, apply, build, decode, inputs, variants

GROUPED = {"num_heads": 6, "num_kv_heads": 2}


@variants(square={"qkv_bias": True, **GROUPED})
class TestMLP(MixerContract):
    name = "mlp"
    endless = True


@variants(full={"qkv_bias": True, "qk_norm": True, **GROUPED})
class TestApprox(MixerContract):
    name = "approx"


@variants(
    plain={"qkv_bias": True, **GROUPED},
    normed={"qk_norm": True, "norm_order": "norm_then_silu", "logit_softcap": 3.0},
)
class TestNonApprox(MixerContract):
    name = "nonapprox"
    endless = True


@variants(own_norm={"static_norm": "own", "qk_norm": True, **GROUPED})
class TestStaticEmbedding(MixerContract):
    name = "staticemb_qk"


@variants(own_input={"qkv_bias": True, **GROUPED})
class TestRandomEmbedding(MixerContract):
    """Without a source, so as ordinary attention; tests with one are below."""

    name = "rndemb_qk"

    def test_flops_formula_matches_the_compiler(self, options):
        module, params = build(
            self.name, channels=128, **(options | {"implementation": "reference", "head_dim": 128})
        )
        x, source = jnp.zeros((B, T, 128)), jnp.zeros((1, T, 128))
        call = jax.jit(
            lambda p, x, s: module.apply(p, x, positions=None, source=s, rows=jnp.zeros((B, T), jnp.int32))
        )
        counted = call.lower(params, x, source).compile().cost_analysis()["flops"]
        c = module.config
        once = T * 2 * 128 * c.head_dim * (c.num_heads + c.num_kv_heads)  # queries and keys, whatever B
        formula = B * T * module.forward_flops(c, 128, visible=T) + once
        assert 1 <= counted / formula < self.flops_excess


def test_the_two_fixed_maps_differ_in_their_source_alone():
    module, params = build("rndemb_qk")
    twin, _ = build("fixedseq_qk")
    np.testing.assert_array_equal(apply(twin, params, inputs()), apply(module, params, inputs()))
    assert (type(module).source, type(twin).source) == ("random", "text")


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "base"),
    [
        ("mlp", {"mlp_match": "four_thirds"}, {}),
        ("mlp", {"qkv_bias": True}, {}),
        ("approx", {"approx_form": "diag_joint"}, {}),
        ("approx", {"approx_form": "diag_separate"}, {"approx_form": "diag_joint"}),
        ("approx", {"approx_rope": False}, {}),
        ("approx", {"rope_theta": 10.0}, {}),
        ("approx", {"qk_norm": True}, {}),
        ("nonapprox", {"qkv_bias": True}, {}),
        ("nonapprox", {"qk_norm": True}, {}),
        ("nonapprox", {"norm_order": "norm_then_silu"}, {"qk_norm": True}),
        ("nonapprox", {"scale": 1.0}, {}),
        ("nonapprox", {"logit_softcap": 0.1}, {}),
        ("rndemb_qk", {"rope": False}, {}),
        ("rndemb_qk", {"rope_theta": 10.0}, {}),
        ("rndemb_qk", {"qk_norm": True}, {}),
        ("staticemb_qk", {"static_norm": "own"}, {}),
    ],
)
def test_every_option_changes_the_output(name, changes, base):
    x = inputs()
    module, params = build(name, **base)
    changed, other = build(name, **(base | changes))
    filled = jax.tree.map(
        lambda leaf: leaf + 0.3, other["params"]
    )  # new parameters: not at their neutral init
    shapes = jax.tree.map(jnp.shape, other["params"])
    kept = {
        layer: {k: v for k, v in leaves.items() if jnp.shape(v) == shapes.get(layer, {}).get(k)}
        for layer, leaves in params["params"].items()
        if layer in filled
    }
    merged = {layer: leaves | kept.get(layer, {}) for layer, leaves in filled.items()}
    assert np.abs(apply(changed, {"params": merged}, x) - apply(module, params, x)).max() > 1e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MLPMixerConfig(mlp_match="thirds"), "mlp_match='thirds' is unknown; choose one of square"),
        (MLPMixerConfig(mlp_match="four_thirds", qkv_bias=True), "has no biases"),
        (ApproxConfig(approx_form="half"), "approx_form='half' is unknown"),
        (ApproxConfig(head_dim=7), "even head_dim, got 7"),
        (NonApproxConfig(norm_order="norm_then_silu"), "no effect without qk_norm"),
        (NonApproxConfig(norm_order="x", qk_norm=True), "norm_order='x' is unknown"),
        (NonApproxConfig(scale=-1.0), "scale=-1.0"),
        (StaticEmbeddingConfig(static_norm="other"), "static_norm='other' is unknown"),
    ],
)
def test_bad_options_are_refused_with_their_values(config, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, num_heads=2, head_dim=config.head_dim or 10).resolve(2, 0, 10, C)


def test_widths_match_the_parameters_of_attention():
    config = MLPMixerConfig(num_heads=6, num_kv_heads=2, head_dim=10)
    assert (config.inner(60), MLPMixerConfig(mlp_match="four_thirds").inner(22)) == (33, 29)
    assert MLPMixerConfig(num_heads=2, num_kv_heads=2, head_dim=10).inner(22) == 20


def test_the_four_thirds_mlp_has_no_output_projection_and_its_own_cost():
    module, params = build("mlp", mlp_match="four_thirds")
    assert sorted(params["params"]) == ["down", "gate", "up"]
    assert module.forward_flops(module.config, C, visible=9) == 2 * 3 * C * 29
    x = inputs()
    np.testing.assert_allclose(decode(module, params, x, (9, 1, 13))[0], apply(module, params, x), atol=1e-5)


def test_a_diagonal_form_is_decoded_with_left_padding():
    module, params = build("approx", approx_form="diag_joint", approx_rope=False, **GROUPED)
    x, starts = inputs(), jnp.array([0, 5, 20])
    want = apply(module, params, x, positions=jnp.arange(T)[None] - starts[:, None], starts=starts)
    got, _ = decode(module, params, x, (9, 1, 13), starts=starts)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(got[row, start:], want[row, start:], atol=1e-4)


# --- approx ------------------------------------------------------------------------------------------------


def heads(seed: int, *shape, scale=1.0, dtype=jnp.float32):
    return scale * jax.random.normal(jax.random.key(seed), shape, dtype)


def test_taylor_weights_are_a_distribution_of_no_less_than_half():
    """With one-hot values the output is the map itself."""
    q, k = heads(0, 1, 7, 3, 5, scale=3.0), heads(1, 1, 7, 3, 5, scale=3.0)
    v = jnp.broadcast_to(jnp.eye(7)[None, :, None], (1, 7, 3, 7))
    rows = np.asarray(taylor_attention(q, k, v))[0].swapaxes(0, 1)  # [H, T, S]
    np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-5)
    s = np.einsum("thd,shd->hts", q[0], k[0]) / np.sqrt(5)
    z = np.tril(1 + s + s * s / 2).sum(-1, keepdims=True)
    assert np.all(rows * z + np.triu(np.ones((7, 7)), 1) >= 0.5 - 1e-4)
    assert np.all(np.triu(rows, 1) == 0)


def test_taylor_is_softmax_for_small_logits_and_uniform_for_none():
    q, k, v = heads(0, 2, 9, 3, 5), heads(1, 2, 9, 3, 5), heads(2, 2, 9, 3, 5)
    taylor, softmax = jax.jit(taylor_attention), jax.jit(softmax_attention)
    errors = [np.abs(taylor(e * q, k, v) - softmax(e * q, k, v)).max() for e in (0.1, 0.05)]
    assert errors[0] < 1e-2 and errors[0] / errors[1] > 6  # of third order
    mean = np.cumsum(v, axis=1) / np.arange(1, 10)[:, None, None]
    np.testing.assert_allclose(taylor(0 * q, k, v), mean, atol=1e-5)


def test_taylor_forms_agree_where_they_must():
    q, k, v = heads(0, 2, 9, 3, 1), heads(1, 2, 9, 3, 1), heads(2, 2, 9, 3, 5)
    full = taylor_attention(q, k, v)
    np.testing.assert_allclose(taylor_attention(q, k, v, form="diag_joint"), full, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_taylor_implementations_agree_under_every_mask(form):
    """Positive queries and keys keep the denominators of the diagonal forms away from 0."""
    q, k, v = (jnp.abs(heads(seed, 2, 131, n, d)) for seed, n, d in ((0, 6, 5), (1, 2, 5), (2, 2, 3)))
    segments = jnp.array([[1] * 60 + [2] * 67 + [0] * 4, [1] * 131])
    mask = Mask(window=70, q_segments=segments, kv_segments=segments, starts=jnp.array([3, 0]))

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, *qkv):
        call = functools.partial(taylor_attention, form=form, mask=mask, implementation=implementation)
        out, pull = jax.vjp(call, *qkv)
        return out, *pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    for got, want in zip(run("blockwise", q, k, v), run("reference", q, k, v), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())
    assert np.all(run(None, q, k, v)[0][0, :3] == 0)


def test_taylor_denominators_keep_away_from_zero_without_a_gradient():
    z = jnp.array([2.0, 1e-7, -1e-7, 0.0, -3.0])
    np.testing.assert_allclose(away_from_zero(z), [2, 1e-6, -1e-6, 1e-6, -3], rtol=1e-6)
    np.testing.assert_array_equal(jax.vmap(jax.grad(away_from_zero))(z), [1, 0, 0, 0, 1])


def test_taylor_states_add_up_and_answer_like_the_parallel_form():
    q, k, v = heads(0, 2, 9, 6, 5), heads(1, 2, 9, 2, 5), heads(2, 2, 9, 2, 3)
    halves = jax.tree.map(jnp.add, taylor_state(k[:, :4], v[:, :4]), taylor_state(k[:, 4:], v[:, 4:]))
    want = jax.jit(taylor_attention)(q, k, v)[:, -1]
    np.testing.assert_allclose(read_taylor_state(q[:, -1], halves), want, atol=1e-5)


def test_taylor_gradients():
    with jax.enable_x64(True):
        qkv = [0.5 + jnp.abs(heads(n, 1, 4, 2, 3, dtype=jnp.float64)) for n in range(3)]
        for form in FORMS:
            check_grads(
                functools.partial(taylor_attention, form=form), qkv, order=1, modes=["rev"], rtol=1e-5
            )


def test_taylor_refuses_unknown_forms():
    with pytest.raises(ValueError, match="form='half' is unknown"):
        taylor_attention(*(jnp.zeros((1, 2, 1, 2)),) * 3, form="half")


# --- nonapprox ---------------------------------------------------------------------------------------------


def test_nonapprox_is_blind_to_rotation_and_to_a_constant():
    q, k, v = heads(0, 2, 9, 4, 6), heads(1, 2, 9, 2, 6), heads(2, 2, 9, 2, 5)
    call = jax.jit(nonapprox_attention)
    want = call(q, k, v)
    turned = (rotate(x, jnp.arange(9)[None], 100.0) for x in (q, k))
    np.testing.assert_allclose(call(*turned, v), want, atol=1e-5)
    ones = jnp.ones((2, 9, 4, 1)), jnp.ones((2, 9, 2, 1))
    more = (jnp.concatenate([x, one], axis=-1) for x, one in zip((q, k), ones, strict=True))
    scaled = jax.jit(functools.partial(nonapprox_attention, scale=6**-0.5))
    np.testing.assert_allclose(scaled(*more, v), want, atol=1e-5)


def test_nonapprox_is_softmax_attention_with_queries_of_one():
    q, k, v = heads(0, 2, 9, 3, 6), heads(1, 2, 9, 3, 6), heads(2, 2, 9, 3, 5)
    s = prefix_logits(q, k)[..., None]
    want = softmax_attention(jnp.ones_like(s), s, v, scale=1.0)
    np.testing.assert_allclose(nonapprox_attention(q, k, v), want, atol=1e-5)
    np.testing.assert_allclose(
        nonapprox_attention(0 * q, k, v), np.cumsum(v, axis=1) / np.arange(1, 10)[:, None, None], atol=1e-5
    )


def test_nonapprox_logits_are_scaled_then_capped():
    q, k = heads(0, 1, 3, 4, 6), heads(1, 1, 3, 2, 6)
    plain = np.einsum("bshd,bshd->bsh", q, np.repeat(k, 2, axis=2))
    np.testing.assert_allclose(prefix_logits(q, k), plain / np.sqrt(6), rtol=1e-5)
    capped = prefix_logits(q, k, scale=2.0, softcap=0.5)
    np.testing.assert_allclose(capped, 0.5 * np.tanh(4 * plain), rtol=1e-4)


def test_nonapprox_is_finite_for_huge_logits_and_keeps_no_positions():
    module, params = build("nonapprox", scale=1e4)
    assert np.all(np.isfinite(apply(module, params, inputs())))
    _, cache = decode(module, params, inputs(), (5, 1, 17), length=10_000)
    assert sum(leaf.size for leaf in jax.tree.leaves(cache.state)) == B * module.state_size(module.config, 1)


# --- one map for a batch -----------------------------------------------------------------------------------


def test_a_shared_map_is_the_map_repeated_and_its_gradients_are_sums():
    q, k, v = heads(0, 1, 9, 6, 5), heads(1, 1, 9, 2, 5), heads(2, 3, 9, 2, 4)
    weight = jnp.cos(jnp.arange(3 * 9 * 6 * 4.0)).reshape(3, 9, 6, 4)

    def repeated(q, k, v):
        return softmax_attention(*(jnp.repeat(x, 3, axis=0) for x in (q, k)), v)

    for implementation in ("reference", "blockwise"):
        shared = functools.partial(shared_qk_attention, implementation=implementation)
        np.testing.assert_allclose(jax.jit(shared)(q, k, v), jax.jit(repeated)(q, k, v), atol=1e-5)
        gradients = [
            jax.jit(jax.grad(lambda q, k, v, f=f: jnp.sum(f(q, k, v) * weight), argnums=(0, 1, 2)))(q, k, v)
            for f in (shared, repeated)
        ]
        for got, want in zip(*gradients, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_shared_map_is_shared_by_the_devices_of_a_mesh():
    q, k, v = heads(0, 1, 9, 4, 5), heads(1, 1, 9, 4, 5), heads(2, 4, 9, 4, 3)

    def loss(q, k, v):
        o, lse = shared_qk_attention(q, k, v, return_lse=True)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(lse))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    want = gradient(q, k, v)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])):
        got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_a_shared_map_refuses_masks_of_single_rows():
    operands = (jnp.zeros((1, 2, 1, 2)), jnp.zeros((1, 2, 1, 2)), jnp.zeros((3, 2, 1, 2)))
    with pytest.raises(ValueError, match="mask.starts differs between batch rows"):
        shared_qk_attention(*operands, mask=Mask(starts=jnp.zeros(3, jnp.int32)))


def sourced(name="fixedseq_qk", **options):
    module, params = build(name, **GROUPED, **options)
    return module, params, jax.random.normal(jax.random.key(9), (1, T, C))


def test_a_source_gives_one_map_whatever_the_input():
    """The output is then linear in the values, and depends on the rows before it alone."""
    module, params, source = sourced()
    x, y = inputs(), inputs(seed=3)
    f = jax.jit(lambda x, source: module.apply(params, x, positions=None, source=source))
    np.testing.assert_allclose(f(x + y, source), f(x, source) + f(y, source), atol=1e-4)
    np.testing.assert_allclose(f(x, source)[1:2], f(x[1:2], source), atol=1e-5)
    later = source.at[:, 11:].set(7.0)
    np.testing.assert_array_equal(f(x, later)[:, :11], f(x, source)[:, :11])
    assert np.abs(f(x, later)[:, 11:] - f(x, source)[:, 11:]).max() > 1e-3


def test_rows_choose_from_the_source():
    """Packed and padded tokens read the rows of their positions; the map they share is only computed otherwise."""
    module, params, source = sourced(qk_norm=True)
    x = inputs()
    f = jax.jit(functools.partial(module.apply, params, positions=None, source=source))
    whole = f(x)
    np.testing.assert_allclose(f(x, rows=jnp.arange(T)[None]), whole, atol=1e-5)
    one = jnp.ones((B, T), jnp.int32)
    np.testing.assert_allclose(f(x, segments=one), whole, atol=1e-5)
    rows, segments = jnp.array([[*range(11), *range(12)]]), jnp.array([[1] * 11 + [2] * 12] * B)
    packed = f(x, rows=rows, segments=segments)
    apart = [f(x[:, :11], rows=rows[:, :11]), f(x[:, 11:], rows=rows[:, 11:])]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), atol=1e-5)


@pytest.mark.parametrize("starts", [None, (0, 5, 20)])
def test_a_source_is_decoded_in_lock_step(starts):
    module, params, source = sourced()
    starts = None if starts is None else jnp.array(starts)
    x = inputs()
    rows = None if starts is None else jnp.arange(T)[None] - starts[:, None]
    call = jax.jit(functools.partial(module.apply, params, positions=None))
    want = call(x, source=source, rows=rows, starts=starts)
    cache, outputs = module.init_cache(B, T, starts, shared=True), []
    assert cache.key.shape[0] == 1 and (cache.query is None) == (starts is None)
    for a, b in ((0, 9), (9, 10), (10, T)):
        method = "step" if b - a == 1 else "prefill"
        append = jax.jit(functools.partial(module.apply, params, method=method))
        y, cache = append(x[:, a:b], cache, source=source[:, a:b])
        outputs.append(y)
    got = jnp.concatenate(outputs, axis=1)
    for row, start in enumerate([0] * B if starts is None else starts):
        np.testing.assert_allclose(got[row, start:], want[row, start:], atol=1e-5)


def test_rows_out_of_range_take_the_nearest():
    x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    np.testing.assert_array_equal(take_rows(x, jnp.array([[-4, 0, 2, 9]])).ravel(), [0, 0, 2, 2])
