"""cosFormer: the layer under the shared contract, every option, and the operator's properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.cosformer import (
    ACTIVATIONS,
    CosformerConfig,
    cosformer_attention,
    divide,
    normalise,
    reweighting_angle,
)
from attnlab.attention.cosformer_states import AbsoluteState
from kernels.linear import State
from kernels.masks import Mask
from tests.attention.contract import MixerContract, apply, build, decode, inputs, variants


@variants(
    plain={},
    norm_grouped_rotating={
        "num_heads": 6, "num_kv_heads": 2, "act": "elu1", "denominator": "norm", "norm": "layer",
        "frequencies": "learned", "decode_frame": "rotating",
    },
)  # fmt: skip
class TestCosformerMixer(MixerContract):
    name = "cosformer"
    flops_options = {"implementation": "blockwise", "head_dim": 128}


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"max_length": 23}, {}),
        ({"m_mode": "length"}, {}),
        ({"act": "elu1"}, {}),
        ({"act": "leaky_relu"}, {}),
        ({"act": "elu"}, {}),
        ({"act": "identity"}, {}),
        ({"denominator": "add"}, {"eps": 0.1}),
        ({"denominator": "norm"}, {}),
        ({"eps": 1.0}, {}),
        ({"norm": "rms"}, {"denominator": "norm", "output_norm_eps": 0.1}),
        ({"norm": "layer"}, {"denominator": "norm"}),
        ({"norm_per_head": True}, {"denominator": "norm"}),
        ({"norm_per_head": True}, {"denominator": "norm", "norm": "rms"}),
        ({"output_norm_eps": 1.0}, {"denominator": "norm"}),
        ({"angle_scale": 0.1}, {"max_length": 23}),
        ({"frequencies": "fixed"}, {"denominator": "norm"}),
        ({"frequencies": "learned"}, {"denominator": "norm"}),
        ({"frequency_base": 10.0}, {"denominator": "norm", "frequencies": "fixed"}),
        ({"angle_scale": 0.5}, {"denominator": "norm", "frequencies": "fixed"}),
    ],
)
def test_every_option_changes_the_output(changes, base):
    x, positions = inputs(), jnp.arange(23)[None]
    module, params = build("cosformer", **base)
    changed = module.clone(config=dataclasses.replace(module.config, **changes))
    wanted = jax.eval_shape(changed.init, jax.random.key(0), x, positions=positions)["params"]
    ones = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), wanted)
    kept = {"params": {name: params["params"].get(name, new) for name, new in ones.items()}}
    assert np.abs(apply(changed, kept, x) - apply(module, params, x)).max() > 1e-4


def test_the_output_projection_and_its_bias_can_be_left_out():
    module, params = build("cosformer", out_proj=False, head_dim=11)
    assert "out" not in params["params"] and apply(module, params, inputs()).shape == inputs().shape
    params = build("cosformer", out_bias=False, qkv_bias=False)[1]["params"]
    assert {name: list(leaf) for name, leaf in params.items()} == dict.fromkeys(params, ["kernel"])
    with pytest.raises(
        ValueError, match="out_proj=False needs num_heads . head_dim = 20 to be hidden_size=22"
    ):
        build("cosformer", out_proj=False)


def test_initial_values_are_the_authors():
    """query and key uniform in +-1/sqrt(C); value Xavier with gain 1/sqrt(2); out Xavier with bias 0."""
    _, params = build("cosformer", channels=200, num_heads=4, head_dim=50)
    spread = {name: np.abs(leaf["kernel"]).max() for name, leaf in params["params"].items()}
    bound = {"query": 200**-0.5, "key": 200**-0.5, "value": (3 / 400) ** 0.5, "out": (6 / 400) ** 0.5}
    for name, largest in bound.items():
        assert 0.999 * largest < spread[name] <= largest, name
        biases = np.abs(params["params"][name]["bias"]).max()
        assert biases == 0 if name == "out" else 0.9 * 200**-0.5 < biases <= 200**-0.5
    for init, low, high in (("uniform", 0.99 * 200**-0.5, 200**-0.5), ("normal", 3 * 0.3, 6 * 0.3)):
        _, params = build("cosformer", channels=200, num_heads=4, head_dim=50, init=init)
        for name in bound:
            assert low < np.abs(params["params"][name]["kernel"]).max() <= high, (init, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act": "gelu"}, "act='gelu' is unknown; choose one of 'relu', 'elu1'"),
        ({"denominator": "none"}, "denominator='none' is unknown"),
        ({"norm": "batch"}, "norm='batch' is unknown"),
        ({"m_mode": "long"}, "m_mode='long' is unknown"),
        ({"init": "zeros"}, "init='zeros' is unknown"),
        ({"decode_frame": "polar"}, "decode_frame='polar' is unknown"),
        ({"norm": "rms"}, "norm='rms' and norm_per_head=False have no effect with denominator='clamp'"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"eps": 0.0}, "eps=0.0 and output_norm_eps=1e-08 must be positive"),
        ({"angle_scale": 1.5}, r"angle_scale=1.5 is outside \[0, 1\]"),
        ({"frequencies": "learned"}, "makes negative weights, which denominator='clamp' cannot take"),
        (
            {"frequencies": "fixed", "denominator": "norm", "m_mode": "length"},
            "m_mode='length' has no effect",
        ),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads=3 is not a multiple of num_kv_heads=2"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        CosformerConfig(**({"num_heads": 2, "head_dim": 10} | options)).resolve(2, 0, 10, 22)


@pytest.mark.parametrize("frame", ["absolute", "rotating"])
def test_without_cosine_decoding_is_the_same(frame):
    module, params = build("cosformer", angle_scale=0.0, denominator="add", decode_frame=frame)
    got, _ = decode(module, params, inputs(7), (3, 1, 1, 2))
    np.testing.assert_allclose(got, apply(module, params, inputs(7)), atol=2e-5)


def test_no_row_and_no_cache_may_pass_the_longest_length():
    module, params = build("cosformer", max_length=9)
    apply(module, params, inputs(9))
    with pytest.raises(ValueError, match="10 positions pass max_length=9, where the cosine turns negative"):
        apply(module, params, inputs(10))
    with pytest.raises(ValueError, match="10 positions pass max_length=9"):
        module.init_cache(1, 10)
    y, _ = decode(module, params, inputs(10), (1,) * 10, length=9)
    assert np.all(np.isfinite(y[:, :9])) and np.all(np.isnan(y[:, 9]))
    free, params = build("cosformer", max_length=9, frequencies="fixed", denominator="norm")
    assert np.all(np.isfinite(apply(free, params, inputs(10))))


def test_a_changing_length_has_no_cache_and_no_place_per_row():
    module, _ = build("cosformer", m_mode="length")
    with pytest.raises(ValueError, match="m_mode='length' has no decode state"):
        module.init_cache(1, 5)
    with pytest.raises(ValueError, match="m_mode='per_sequence' is not causal"):
        build("cosformer", m_mode="per_sequence")


def test_the_cache_has_the_frame_asked_for_and_one_size_at_all_lengths():
    for frame, kind in (("absolute", AbsoluteState), ("rotating", State)):
        module, _ = build("cosformer", decode_frame=frame, num_heads=6, num_kv_heads=2)
        cache = module.init_cache(3, 2000)
        assert isinstance(cache.state, kind)
        assert {leaf.shape for leaf in jax.tree.leaves(cache.state)} == {(3, 2, 10, 11)}
        assert (
            module.state_size(module.config, 1) == module.state_size(module.config, 2000) == 2 * 2 * 10 * 11
        )


def test_dead_queries_and_small_denominators_are_noted():
    module, params = build("cosformer")
    dead = {"kernel": jnp.zeros((22, 20)), "bias": jnp.where(jnp.arange(20) < 10, -1.0, 1.0)}
    params = {"params": params["params"] | {"query": dead}}
    noted = jax.jit(lambda p, x: module.apply(p, x, positions=jnp.arange(23)[None], mutable="intermediates"))
    _, notes = noted(params, inputs())
    notes = {name: np.asarray(values[0]) for name, values in notes["intermediates"].items()}
    np.testing.assert_array_equal(notes["dead_query"], [1, 0])
    np.testing.assert_array_equal(notes["low_denominator"], [1, 0])


# The operator.

attend = jax.jit(
    cosformer_attention,
    static_argnames=(
        "m_mode", "max_length", "act", "denominator", "eps", "norm", "angle_scale", "return_denominator",
        "implementation",
    ),
)  # fmt: skip


def operands(T=13, S=13, B=2, H=2, D=5, Dv=3, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, n, H, d)).astype(np.float32) for n, d in ((T, D), (S, D), (S, Dv))]


def test_a_longer_row_changes_its_beginning_only_if_the_length_is_the_rows():
    q, k, v = operands()
    for options, same in (({"max_length": 13}, True), ({"m_mode": "length"}, False)):
        whole = attend(q, k, v, act="elu1", **options)
        start = attend(q[:, :9], k[:, :9], v[:, :9], act="elu1", **options)
        assert (np.abs(whole[:, :9] - start).max() < 1e-6) == same


def test_only_directions_of_queries_and_keys_count_where_the_denominator_is_large():
    q, k, v = operands()
    want = attend(q, k, v, max_length=13, act="relu", eps=1e-12)
    np.testing.assert_allclose(attend(3 * q, 0.5 * k, v, max_length=13, eps=1e-12), want, atol=1e-5)
    assert np.abs(attend(3 * q, k, v, max_length=13, denominator="norm") - want).max() > 1e-2


def test_outputs_are_means_of_values_or_less_below_eps():
    q, k, v = operands()
    o, den = attend(q, k, v, max_length=13, eps=0.5, return_denominator=True)
    ones = attend(q, k, np.ones_like(v), max_length=13, eps=0.5)[..., 0]
    assert np.any(den < 0.5) and np.any(den > 0.5) and np.all(np.asarray(den) >= -1e-6)
    np.testing.assert_allclose(ones, np.minimum(np.maximum(den, 0) / 0.5, 1), atol=1e-5)
    sure = np.asarray(den) > 0.5
    low, high = np.minimum.accumulate(v, 1), np.maximum.accumulate(v, 1)
    assert np.all((o >= low - 1e-5)[sure]) and np.all((o <= high + 1e-5)[sure])


def test_without_angle_or_with_a_far_length_it_is_plain_linear_attention():
    q, k, v = operands()
    plain = attend(q, k, v, max_length=13, angle_scale=0.0)
    np.testing.assert_allclose(attend(q, k, v, max_length=10**6), plain, atol=1e-5)
    assert np.abs(attend(q, k, v, max_length=13) - plain).max() > 1e-2
    one = attend(np.abs(q[:, :1]), np.abs(k[:, :1]), v[:, :1], max_length=13)
    np.testing.assert_allclose(one, v[:, :1], atol=1e-5)


def test_dead_rows_are_zero_with_zero_gradients():
    q, k, v = operands()
    q[:, 4] = -1.0
    hidden = np.ones((2, 13), bool)
    hidden[1] = False  # a row without keys

    def loss(q, k, v):
        o = attend(q, k, v, max_length=13, key_mask=hidden)
        return jnp.sum(jnp.sin(o + 1)), o

    gradients, o = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert (
        np.all(np.asarray(o)[:, 4] == 0) and np.all(np.asarray(o)[1] == 0) and np.any(np.asarray(o)[0] != 0)
    )
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert np.all(np.asarray(gradients[0])[:, 4] == 0) and all(
        np.all(np.asarray(g)[1] == 0) for g in gradients
    )


@pytest.mark.parametrize("causal", [True, False])
def test_a_key_mask_equals_a_dense_mask_and_lengths_equal_shorter_rows(causal):
    q, k, v = operands(T=13 if causal else 7)
    keys = np.random.default_rng(1).random((2, 13)) < 0.6
    mask = Mask(causal=causal)
    dense = np.broadcast_to(keys[:, None], (2, q.shape[1], 13))
    got = attend(q, k, v, mask=mask, max_length=13, key_mask=keys, implementation="blockwise")
    np.testing.assert_allclose(got, attend(q, k, v, mask=mask, max_length=13, allowed=dense), atol=1e-5)
    got = attend(q, k, v, mask=Mask(causal=causal, lengths=jnp.array([5, 5])), max_length=13)
    first = slice(0, 5) if causal else slice(None)
    want = attend(q[:, first], k[:, :5], v[:, :5], mask=mask, max_length=13)
    np.testing.assert_allclose(got[:, first], want, atol=1e-5)


def test_with_a_length_a_row_padding_changes_nothing():
    q, k, v = operands()
    lengths = np.array([13, 6])
    keys = np.arange(13) < lengths[:, None]
    for where in ({"key_mask": keys}, {"mask": Mask(causal=False, lengths=lengths)}):
        where = {"mask": Mask(causal=False)} | where
        got = attend(q, k, v, m_mode="per_sequence", **where)
        for row, n in enumerate(lengths):
            alone = attend(
                *(x[row : row + 1, :n] for x in (q, k, v)), mask=Mask(causal=False), m_mode="length"
            )
            np.testing.assert_allclose(got[row, :n], alone[0], atol=1e-5)


def test_angles_of_channels_can_be_learned():
    q, k, v = operands()
    freqs = np.linspace(0.01, 1.0, 5).astype(np.float32)

    def loss(freqs, implementation):
        o = cosformer_attention(q, k, v, freqs=freqs, denominator="norm", implementation=implementation)
        return jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got, want = gradient(freqs, "blockwise"), gradient(freqs, "reference")
    assert np.all(np.abs(want) > 1e-3)
    np.testing.assert_allclose(got, want, rtol=1e-3)
    shared = attend(q, k, v, freqs=np.full(5, reweighting_angle(20), np.float32), denominator="norm")
    np.testing.assert_allclose(shared, attend(q, k, v, max_length=20, denominator="norm"), atol=1e-5)


@pytest.mark.parametrize("options", [{"eps": 0.5}, {"act": "elu1", "denominator": "norm"}])
def test_gradients_equal_finite_differences(options):
    """Far from the kinks of ReLU; with eps = 0.5, rows below and above it."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in operands(T=6, S=6, B=1, seed=3)]
        away = [jnp.sign(x) * (jnp.abs(x) + 0.01) for x in arrays]

        def loss(arrays):
            o = cosformer_attention(*arrays, max_length=6, **options)
            return jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape))

        run, gradients = jax.jit(loss), jax.jit(jax.grad(loss))(away)
        for n, x in enumerate(away):
            direction = jax.random.normal(jax.random.key(n), x.shape, x.dtype)
            ends = [run([*away[:n], x + step * direction, *away[n + 1 :]]) for step in (1e-6, -1e-6)]
            np.testing.assert_allclose(
                (ends[0] - ends[1]) / 2e-6, jnp.sum(gradients[n] * direction), rtol=1e-6
            )


def test_bfloat16_loses_no_more_than_its_inputs_do():
    q, k, v = operands(T=200, S=200, D=16, Dv=8)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    exact = attend(*(x.astype(jnp.float32) for x in narrow), max_length=200, eps=1e-2)
    error = np.asarray(attend(*narrow, max_length=200, eps=1e-2), np.float32) - exact
    assert np.sqrt(np.mean(error**2)) < 2**-9 * np.sqrt(np.mean(exact**2))  # rounding of the result alone


def test_the_cosine_concentrates_weights_between_softmax_and_plain_relu():
    """Entropy of a row over the log of its length, rows 128 to 255: softmax < relu with cosine < relu < elu1."""
    rng, T, D = np.random.default_rng(0), 256, 64
    q, k = rng.normal(size=(4, T, D)), rng.normal(size=(4, T, D))
    scores, distance = np.einsum("btd,bsd->bts", q, k), np.arange(T)[:, None] - np.arange(T)
    product = {
        a: np.einsum("btd,bsd->bts", *(np.asarray(ACTIVATIONS[a](x)) for x in (q, k)))
        for a in ("relu", "elu1")
    }
    weights = {
        "softmax": np.exp(scores / np.sqrt(D)),
        "relu and cosine": product["relu"] * np.cos(reweighting_angle(T) * distance),
        "relu": product["relu"],
        "elu1": product["elu1"],
    }
    entropy = []
    for w in weights.values():
        p = np.tril(w)[:, T // 2 :]
        p = p / p.sum(-1, keepdims=True)
        rows = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)
        entropy.append(np.mean(rows / np.log(np.arange(T // 2, T) + 1)))
    assert entropy == sorted(entropy) and min(np.diff(entropy)) > 0.003, entropy
    np.testing.assert_allclose(entropy, [0.91, 0.98, 0.99, 1.0], atol=0.012)
    v = jnp.eye(T)[None, :, None].repeat(4, 0)  # reads the weights out of the operator
    got = attend(*(jnp.asarray(x[:, :, None], jnp.float32) for x in (q, k)), v, max_length=T)[:, :, 0]
    want = np.tril(weights["relu and cosine"])
    np.testing.assert_allclose(got, want / want.sum(-1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "m_mode='fixed' needs max_length"),
        ({"max_length": 12}, "13 positions pass max_length=12"),
        ({"max_length": 20, "mask": Mask(q_offset=8)}, "21 positions pass max_length=20"),
        ({"max_length": 20, "m_mode": "length"}, "max_length=20 has no effect with m_mode='length'"),
        ({"m_mode": "per_sequence"}, "needs a mask with causal=False"),
        ({"m_mode": "none"}, "m_mode='none' is unknown"),
        ({"max_length": 20, "eps": 0.0}, "eps=0.0 must be positive"),
        (
            {"max_length": 20, "norm_per_head": True},
            "norm_per_head=True have no effect with denominator='clamp'",
        ),
        ({"max_length": 20, "freqs": np.zeros(5, np.float32)}, "have no effect with freqs"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cosformer_attention(*operands(), **options)


def test_division_and_norms_by_hand():
    num, den = jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.array([2.0, -1.0])
    np.testing.assert_allclose(divide(num, den, "clamp", 0.5), [[1.5, 2], [0, 0]])
    np.testing.assert_allclose(divide(num, den, "add", 0.5), [[1.2, 1.6], [0, 0]])
    root = np.sqrt(6.25)  # over four numbers, 9 + 16
    np.testing.assert_allclose(normalise(num, "srms", 0.5), num / (root + 0.5), rtol=1e-6)
    np.testing.assert_allclose(normalise(num, "rms", 0.5), num / np.sqrt(6.25 + 0.5), rtol=1e-6)
    np.testing.assert_allclose(
        normalise(num, "layer", 0.5), (num - 1.75) / np.sqrt(6.25 - 1.75**2 + 0.5), rtol=1e-6
    )
    heads = normalise(num, "srms", 1e-8, per_head=True)
    np.testing.assert_allclose(heads, [[3 / 12.5**0.5, 4 / 12.5**0.5], [0, 0]], rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: normalise(x, "srms", 1e-8).sum())(jnp.zeros((2, 2)))))
