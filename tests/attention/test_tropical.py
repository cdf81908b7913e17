"""The paper's functions and the multi-head layer: properties by mathematics, options, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.tropical import (
    VARIANTS,
    MHTAConfig,
    MultiHeadTropicalAttention,
    apply_gauge,
    drop_coordinates,
    hilbert_distance,
    mhta_params,
    torch_bias_init,
    torch_linear_init,
    trop_init,
    tropical_attention,
    tropical_linear,
    tropical_scores,
    valuation,
)
from attnlab.attention.tropical_diagnostics import smooth_context_factorised, winner_margins
from kernels.masks import Mask

C, H = 12, 3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer(heads=H, **options):
    module = MultiHeadTropicalAttention(MHTAConfig(**options), C, heads)
    return module, module.init(jax.random.key(0), jnp.zeros((1, 2, C)))


def run(module, params, x, **options):
    return jax.jit(lambda params, x: module.apply(params, x, **options))(params, x)


def test_the_hilbert_distance_is_a_projective_metric_which_linear_maps_do_not_widen():
    x, y, z = (normal(50, 7, seed=n) for n in range(3))
    d = hilbert_distance
    np.testing.assert_array_equal(d(x, y), d(y, x))
    assert np.all(d(x, z) <= d(x, y) + d(y, z) + 1e-6) and np.all(d(x, y) > 0)
    np.testing.assert_allclose(d(x + 3, y - normal(50, 1, seed=4)), d(x, y), atol=1e-5)
    np.testing.assert_allclose(d(x, x + 2.5), 0, atol=1e-6)
    w = normal(9, 7, seed=5)
    assert np.all(d(tropical_linear(x, w), tropical_linear(y, w)) <= d(x, y) + 1e-6)
    q, k = normal(2, 5, 3, 7), normal(2, 4, 3, 7, seed=1)
    want = -hilbert_distance(q.swapaxes(1, 2)[:, :, :, None], k.swapaxes(1, 2)[:, :, None])
    np.testing.assert_array_equal(tropical_scores(q, k), want)


def test_valuation_and_its_gradient():
    x = jnp.array([-2.0, 0.0, 1.5])
    np.testing.assert_allclose(valuation(x), np.log1p([0, 0, 1.5]), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: valuation(x).sum())(x), [0, 0, 1 / 2.5], rtol=1e-6)
    np.testing.assert_allclose(valuation(x, "log"), np.log([1e-6, 1e-6, 1.5]), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: valuation(x, "log").sum())(x), [0, 0, 1 / 1.5], rtol=1e-6)
    assert valuation(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_a_threshold_shifts_the_columns_of_the_map_when_there_is_one_head():
    """Then lambda is no new freedom: (u - lambda) W is u W' with W' = W - lambda."""
    module, params = layer(heads=1, gauge="lambda")
    plain, _ = layer(heads=1)
    p = params["params"] | {"lambda_param": jnp.asarray(normal(C, seed=3))}
    shifted = {
        n: x - p["lambda_param"] if n.endswith("trop") else x for n, x in p.items() if n != "lambda_param"
    }
    x = normal(2, 7, C)
    np.testing.assert_allclose(run(module, {"params": p}, x), run(plain, {"params": shifted}, x), atol=1e-5)


def test_the_gauges_none_and_max_give_equal_scores_but_not_equal_values():
    x = normal(2, 7, C)
    (module, params), (gauged, _) = layer(), layer(gauge="max")
    (y, s), (other, t) = (run(m, params, x, return_scores=True) for m in (module, gauged))
    np.testing.assert_allclose(s, t, atol=1e-5)
    assert np.abs(y - other).max() > 1e-2
    u = jnp.zeros((1, 3))
    np.testing.assert_array_equal(
        jax.jacobian(lambda u: apply_gauge(u, "max"))(u)[0, :, 0], [[0, 0, 0], [-1, 1, 0], [-1, 0, 1]]
    )


def test_permuting_tokens_permutes_the_result_and_repeated_tokens_agree():
    module, params = layer(qkv_linear=True, gauge="lambda")
    x = normal(2, 9, C)
    order = np.random.default_rng(1).permutation(9)
    y = run(module, params, x)
    np.testing.assert_array_equal(run(module, params, x[:, order]), y[:, order])
    x[:, 5] = x[:, 2]
    y = run(module, params, x)
    np.testing.assert_array_equal(y[:, 5], y[:, 2])


def test_masks_and_biases_hide_tokens():
    module, params = layer()
    x = normal(2, 9, C)
    y = run(module, params, x, mask=Mask(causal=False, lengths=jnp.array([9, 4])))
    np.testing.assert_allclose(y[1, :4], run(module, params, x[1:, :4])[0], atol=1e-6)
    hidden = jnp.where(jnp.arange(9) < 4, 0, -jnp.inf)[None, None, None]
    np.testing.assert_array_equal(run(module, params, x, bias=hidden)[1], y[1])
    assert np.all(np.asarray(run(module, params, x, bias=jnp.full((1, 1, 1, 1), -jnp.inf))) == 0)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_linear": True}, {"tropical_proj": False}, {"per_head_trop": True}, {"gauge": "lambda"}, {"gauge": "max"},
        {"valuation": "log"}, {"devaluation": "exp"}, {"score": "hilbert_asym"}, {"score": "maxplus_dot"},
        {"score": "lse_dot"}, {"score_scale": 0.5}, {"trop_init": "evt"}, {"trop_init": "identity"},
        {"context_clip": 0.1}, {"smooth_beta": 2.0}, {"coordinate_dropout": 0.5},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)  # fmt: skip
def test_every_option_changes_the_output_and_both_implementations_agree(changes):
    x = normal(2, 7, C)
    module, params = layer()
    changed, changed_params = layer(**changes)
    training = {"deterministic": False, "rngs": {"dropout": jax.random.key(3)}}
    rest = training if "coordinate_dropout" in changes else {}
    y = run(changed, changed_params, x, **rest)
    assert np.abs(y - run(module, params, x)).max() > 1e-3
    reference, _ = layer(**changes, implementation="reference")
    np.testing.assert_allclose(run(reference, changed_params, x, **rest), y, atol=1e-5)
    if rest:
        np.testing.assert_array_equal(run(changed, changed_params, x), run(module, params, x))


def test_dropped_coordinates_decide_nothing():
    q, k, v = normal(2, 5, 3, 7), normal(2, 6, 3, 7, seed=1), normal(2, 6, 3, 4, seed=2)
    keep = np.array([True, False, True, True, False, True, False])
    all_heads = jnp.broadcast_to(keep, (2, 3, 7))

    def attend(q, k):
        return tropical_attention(q, k, v).sum()

    dropped = lambda q, k: attend(drop_coordinates(q, all_heads), drop_coordinates(k, all_heads))  # noqa: E731
    (value, gradients), (want, less) = (
        jax.value_and_grad(f, argnums=(0, 1))(*x)
        for f, x in ((dropped, (q, k)), (attend, (q[..., keep], k[..., keep])))
    )
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for x, y in zip(gradients, less, strict=True):
        assert np.all(np.asarray(x)[..., ~keep] == 0)
        np.testing.assert_allclose(np.asarray(x)[..., keep], y, atol=1e-6)
    none = drop_coordinates(jnp.asarray(q), jnp.zeros((2, 3, 7), bool))
    np.testing.assert_array_equal(none, np.broadcast_to(q[..., :1], q.shape))


def test_parameter_counts_are_those_of_the_paper():
    """The reported models of width 64 with 2 heads have 40,961 parameters, 8 C^2 + ... of them outside this layer."""
    sizes = {}
    for name, config in VARIANTS.items():
        module = MultiHeadTropicalAttention(config, 64, 2)
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 64)))
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    rest = (
        4 * 64 + 2 * 64 * 256 + 256 + 64 + 4 * 64 + 2 * 64 + 65
    )  # F = 3: input, feed-forward, norms, output
    assert sizes == {"mhta": 3 * 32**2 + 64**2, "mhta_qkv": 3 * 32**2 + 4 * 64**2 + 64}
    assert sizes["mhta"] + rest == 40_961 and sizes["mhta_qkv"] + rest == 53_313


def test_initial_values():
    key = jax.random.key(1)
    w = trop_init("normal")(key, (200, 64))
    np.testing.assert_allclose([w.mean(), w.std()], [0, 1], atol=0.03)
    shifted = trop_init("evt")(key, (200, 64))
    np.testing.assert_allclose(w - shifted, np.sqrt(2 * np.log(64)), rtol=1e-5)
    assert abs(float(shifted.max(1).mean())) < 0.6 < float(w.max(1).mean())
    np.testing.assert_array_equal(trop_init("identity")(key, (2, 3, 3))[1], 4 * np.eye(3) - 4)
    kernel, bias = torch_linear_init(key, (25, 400)), torch_bias_init(25)(key, (400,))
    for x in (kernel, bias):
        assert np.abs(x).max() <= 0.2 and np.abs(x).max() > 0.19
    np.testing.assert_allclose(kernel.std(), 0.2 / np.sqrt(3), rtol=0.02)


def test_published_weights_by_name():
    weights = {"query_trop.W": normal(4, 4), "lambda_param": normal(1, 1, C), "out.weight": normal(C, C)}
    weights["value_linear.weight"] = normal(C, C, seed=1)
    params = mhta_params(weights)
    np.testing.assert_array_equal(params["out"]["kernel"], weights["out.weight"].T)
    np.testing.assert_array_equal(params["value"]["kernel"], weights["value_linear.weight"].T)
    assert params["lambda_param"].shape == (C,) and params["query_trop"] is weights["query_trop.W"]
    with pytest.raises(ValueError, match="'out.bias' is no weight"):
        mhta_params({"out.bias": normal(C)})


def test_bfloat16_layers_decide_winners_in_float32():
    module, params = layer(qkv_linear=True)
    narrow = module.clone(dtype=jnp.bfloat16)
    x = jnp.asarray(normal(2, 9, C), jnp.bfloat16)
    y, wide = run(narrow, params, x), run(module, params, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    assert np.abs(np.asarray(y, np.float32) - wide).max() < 3e-2 * np.abs(wide).max()
    assert all(a.dtype == jnp.float32 for a in narrow.apply(params, x, method="heads"))


def test_margins_certify_winners():
    q, k, v = normal(2, 5, 3, 7), normal(2, 6, 3, 7, seed=1), normal(2, 6, 3, 4, seed=2)
    margins = np.asarray(winner_margins(q, k, v))
    sums = np.asarray(tropical_scores(q, k))[..., None] + v.swapaxes(1, 2)[:, :, None]
    ordered = np.sort(sums, axis=3)
    np.testing.assert_allclose(
        margins, (ordered[:, :, :, -1] - ordered[:, :, :, -2]).swapaxes(1, 2), atol=1e-6
    )
    few = np.asarray(winner_margins(q, k, v, mask=Mask(causal=False, lengths=jnp.array([0, 1]))))
    assert np.all(few[0] == 0) and np.all(few[1] == np.inf)


def test_the_factorised_softening_is_the_direct_one():
    q, k, v = normal(2, 5, 3, 7), normal(2, 6, 3, 7, seed=1), normal(2, 6, 3, 4, seed=2)
    for beta in (0.5, 4.0):
        _, direct = tropical_attention(q, k, v, smooth_beta=beta, return_context=True)
        scores = tropical_scores(q, k, smooth_beta=beta)
        np.testing.assert_allclose(smooth_context_factorised(scores, v, beta), direct, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "cosine"}, "score='cosine' is unknown"),
        ({"gauge": "mean"}, "gauge='mean' is unknown"),
        ({"smooth_beta": -1.0}, "must not be negative"),
        ({"smooth_beta": 1.0, "score": "lse_dot"}, "no effect with score='lse_dot'"),
        ({"coordinate_dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"coordinate_dropout": 0.1, "score": "hilbert_asym"}, "sums over channels"),
        ({"per_head_trop": True, "tropical_proj": False}, "no effect with tropical_proj=False"),
        ({"trop_init": "evt", "tropical_proj": False}, "no effect with tropical_proj=False"),
        ({"heads": 5}, "hidden_size=12 is not a multiple of num_heads=5"),
        ({"implementation": "abacus"}, "implementation='abacus' does not exist"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)
