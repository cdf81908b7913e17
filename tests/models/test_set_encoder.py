"""The set encoder: sizes of the paper, what it may depend on, every option, and the published weights.

Letters: B batch, T tokens, F features, C channels.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.tropical import MHTAConfig
from attnlab.models.set_encoder import (
    SetEncoder,
    SetEncoderConfig,
    dense_adaptive_attention,
    masked_mean,
    set_encoder_preset,
)
from attnlab.models.set_encoder_weights import published_names, published_weights, set_encoder_params
from attnlab.training.trees import named_leaves
from kernels.masks import Mask
from tests.golden.families.tropical_models import configs
from tests.golden.registry import Golden

B, T, F, C = 3, 7, 3, 10
SMALL = SetEncoderConfig(features=F, hidden_size=C, implementation="reference")  # which compiles soonest
DEEP = dataclasses.replace(SMALL, num_layers=2)
ATTENTIONS = ("tropical", "vanilla", "adaptive")
GOLDEN = Path(__file__).parent.parent / "golden" / "tropical"


def small(**changes) -> SetEncoderConfig:
    if changes.get("attention") == "adaptive":
        changes = {"implementation": ""} | changes
    return dataclasses.replace(SMALL, **changes)


@functools.cache
def build(config: SetEncoderConfig, seed: int = 0):
    model = SetEncoder(config)
    return model, jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2, config.features)))


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, x, mask):
    return model.apply(params, x, mask)


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params, x, mask):
    return jax.grad(lambda p: jnp.sum(model.apply(p, x, mask) ** 2))(params)


def apply(config, x=None, mask=None, seed=0):
    model, params = build(config, seed)
    return _apply(model, params, inputs() if x is None else x, mask)


def inputs(seed=0, tokens=T):
    return jax.random.normal(jax.random.key(seed), (B, tokens, F))


def lengths(*sizes):
    return jnp.arange(T)[None] < jnp.array(sizes)[:, None]


@pytest.mark.parametrize(
    "name, counts",  # for F = 2 and 3: table 2 of the paper, and what its code's other variants have
    [
        ("mhta", (40_897, 40_961)),
        ("mhta_lambda", (40_961, 41_025)),
        ("mhta_qkv", (53_249, 53_313)),
        ("vanilla", (50_113, 50_177)),
        ("adaptive", (50_113, 50_177)),
    ],
)
def test_parameters_of_the_paper(name, counts):
    for features, count in zip((2, 3), counts, strict=True):
        config = set_encoder_preset(name, features=features)
        assert config.norm_eps == 1e-5 and not config.pre_norm
        params = jax.eval_shape(SetEncoder(config).init, jax.random.key(0), jnp.zeros((1, 8, features)))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_preset_with_changes():
    config = set_encoder_preset("mhta", features=3, pre_norm=True, pooled=True)
    assert config.pooled and config.pre_norm and not config.published_final_norm
    config.validate()
    with pytest.raises(ValueError, match="unknown encoder 'trop'; known: mhta"):
        set_encoder_preset("trop")


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({"pooled": True}, (B, 1)),
        ({"pooled": True, "regression": True}, (B,)),
        ({}, (B, T, 1)),
        ({"regression": True}, (B, T)),
        ({"num_outputs": 5}, (B, T, 5)),
        ({"pooled": True, "num_outputs": 5}, (B, 5)),
    ],
)
def test_shapes_of_outputs(changes, shape):
    model = SetEncoder(small(attention="vanilla", **changes))
    y, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), inputs())
    assert y.shape == shape and y.dtype == jnp.float32


def test_pooling_is_the_mean_of_token_outputs():
    pooled, tokens = (apply(small(attention="vanilla", pooled=pooled)) for pooled in (True, False))
    np.testing.assert_allclose(pooled, tokens.mean(axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_order_of_tokens_does_not_matter(attention):
    config = small(attention=attention)
    order = np.array([3, 0, 6, 2, 5, 1, 4])
    y = apply(config)
    np.testing.assert_allclose(apply(config, inputs()[:, order]), y[:, order], rtol=2e-5, atol=2e-6)
    assert np.ptp(y, axis=1).min() > 1e-3  # tokens do differ


@pytest.mark.parametrize(
    "attention, pooled",
    [("tropical", False), ("tropical", True), ("vanilla", False), ("adaptive", True)],
)
def test_padding_is_never_seen(attention, pooled):
    """Padded rows equal shorter ones, whatever padding holds, and send exactly no gradient into it."""
    config = small(attention=attention, pooled=pooled)
    model, params = build(config)
    mask = lengths(7, 4, 2)

    @jax.jit
    def run(x):
        def loss(x):
            y = model.apply(params, x, mask)
            real = y if pooled else jnp.where(mask[..., None], y, 0)
            return jnp.sum(real**2), real

        return jax.grad(loss, has_aux=True)(x)

    grad, y = run(inputs())
    other = jnp.where(mask[..., None], inputs(), 1e3 * inputs(1))
    np.testing.assert_array_equal(run(other)[1], y)
    assert (np.asarray(grad)[~np.asarray(mask)] == 0).all()
    assert (np.abs(np.asarray(grad)[np.asarray(mask)]).max(axis=-1) > 0).all()
    alone = _apply(model, params, inputs()[1:2, :4], None)[0]
    np.testing.assert_allclose(y[1] if pooled else y[1, :4], alone, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_instances_without_tokens_are_finite(attention):
    config = small(attention=attention, pooled=True)
    model, params = build(config)
    mask = lengths(7, 0, 3)
    grads = gradient(model, params, inputs(), mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    bias = params["params"]["head"]["bias"]
    np.testing.assert_allclose(_apply(model, params, inputs(), mask)[1], bias)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "vanilla"},
        {"attention": "adaptive"},
        {"pre_norm": True},
        {"norm_eps": 0.1},
        {"num_layers": 2},
        {"num_heads": 5},
        {"mhta": MHTAConfig(qkv_linear=True)},
        {"mhta": MHTAConfig(gauge="lambda")},
        {"mhta": MHTAConfig(score="hilbert_asym")},
        {"mhta": MHTAConfig(tropical_proj=False)},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.thorough
def test_every_option_changes_the_output(changes):
    assert float(jnp.abs(apply(small(**changes)) - apply(SMALL)).max()) > 1e-4


@pytest.mark.parametrize("attention", ["tropical", "vanilla"])
def test_implementations_agree(attention):
    want = apply(small(attention=attention), mask=lengths(7, 4, 2))
    for name in ("", "blockwise"):
        config = small(attention=attention, implementation=name)
        model, (_, params) = SetEncoder(config), build(small(attention=attention))
        got = _apply(model, params, inputs(), lengths(7, 4, 2))
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    with pytest.raises(ValueError, match="nowhere"):
        build(small(attention=attention, implementation="nowhere"))


def test_adaptive_attention_equals_softmax_for_sharp_rows_only():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 5, 3, 4)), jnp.float32) for _ in range(3))

    def softmax(q):
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 2), v)

    np.testing.assert_allclose(dense_adaptive_attention(40 * q, k, v), softmax(40 * q), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(dense_adaptive_attention(q, k, v) - softmax(q)).max()) > 0.01


def test_adaptive_attention_honours_every_field_of_the_mask():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 5, 3, 4)), jnp.float32) for _ in range(3))
    o = dense_adaptive_attention(q, k, v, mask=Mask(causal=True, starts=jnp.array([1, 0])))
    assert (o[0, 0] == 0).all()
    np.testing.assert_allclose(o[0, 1], v[0, 1], rtol=1e-6)
    np.testing.assert_allclose(o[1, 4], dense_adaptive_attention(q[1:, 4:], k[1:], v[1:])[0, 0], rtol=1e-5)


def test_shared_attention_is_one_set_of_parameters():
    deep = dataclasses.replace(DEEP, attention="vanilla")
    config = dataclasses.replace(deep, share_attn_across_layers=True)
    model, params = build(config)
    names = named_leaves(params["params"])
    assert {name.split("/")[0] for name in names if "query" in name} == {"attention"}
    own = {
        f"layers_{i}": params["params"][f"layers_{i}"] | {"attention": params["params"]["attention"]}
        for i in (0, 1)
    }
    twin = SetEncoder(deep)
    apart = {"params": {k: v for k, v in params["params"].items() if k != "attention"} | own}
    np.testing.assert_allclose(_apply(twin, apart, inputs(), None), apply(config), rtol=1e-6, atol=1e-6)
    shared = gradient(model, params, inputs(), None)["params"]["attention"]
    parts = gradient(twin, apart, inputs(), None)["params"]
    summed = jax.tree.map(jnp.add, parts["layers_0"]["attention"], parts["layers_1"]["attention"])
    for name, leaf in named_leaves(summed).items():
        np.testing.assert_allclose(named_leaves(shared)[name], leaf, rtol=1e-4, atol=1e-5)


def test_published_final_norm_is_there_and_unused():
    config = small(attention="vanilla", published_final_norm=True)
    model, params = build(config)
    grads = gradient(model, params, inputs(), None)["params"]
    assert all((leaf == 0).all() for leaf in grads["final_norm"].values())
    assert "final_norm" not in build(small(attention="vanilla"))[1]["params"]


def test_dropout_is_random_only_when_asked_for():
    config = small(attention="vanilla", dropout=0.4)
    model, params = build(config)

    @jax.jit
    def run(seed):
        return model.apply(params, inputs(), deterministic=False, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(run(0), run(0))
    assert float(jnp.abs(run(0) - run(1)).max()) > 1e-2
    np.testing.assert_array_equal(apply(config), apply(small(attention="vanilla")))


@pytest.mark.parametrize("attention", ["tropical", "adaptive"])
def test_bfloat16_stays_near_float32(attention):
    y = apply(small(attention=attention, dtype="bfloat16"))
    exact = apply(small(attention=attention))
    assert y.dtype == jnp.float32
    assert float(jnp.abs(y - exact).max()) < 0.1 * float(jnp.abs(exact).max())


def test_initial_weights_are_uniform_within_the_fan_in():
    _, params = build(small(hidden_size=40, attention="vanilla"))
    for name, fan_in in (("input", F), ("layers_0/feed_forward/down", 160), ("layers_0/attention/out", 40)):
        kernel = named_leaves(params["params"])[f"{name}/kernel"]
        bound = fan_in**-0.5
        assert kernel.shape[0] == fan_in and 0.8 * bound < float(jnp.abs(kernel).max()) <= bound
    bias = params["params"]["layers_0"]["feed_forward"]["down"]["bias"]
    assert 0.7 * 160**-0.5 < float(jnp.abs(bias).max()) <= 160**-0.5


def test_masked_mean():
    h = inputs()
    np.testing.assert_allclose(masked_mean(h, lengths(7, 4, 0))[1], h[1, :4].mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(masked_mean(h, lengths(7, 4, 0))[2], jnp.zeros(F))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 3}, "hidden_size=10 is not a multiple of num_heads=3"),
        ({"attention": "linear"}, "attention='linear' is unknown"),
        ({"attention": "vanilla", "mhta": MHTAConfig(gauge="lambda")}, "mhta has no effect"),
        ({"attention": "adaptive", "implementation": "reference"}, "adaptive attention is dense"),
        ({"regression": True, "num_outputs": 4}, "num_outputs=4"),
        ({"dtype": "float16"}, "dtype='float16' is unknown"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"pre_norm": True, "published_final_norm": True}, "no effect with pre_norm"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"mhta": MHTAConfig(gauge="any")}, "any"),
    ],
    ids=str,
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes).validate()


def test_bad_inputs_are_refused():
    model, params = build(SMALL)
    with pytest.raises(ValueError, match="x has 2 features, the encoder is made for 3"):
        model.apply(params, inputs()[..., :2])
    with pytest.raises(ValueError, match="mask is bool"):
        model.apply(params, inputs(), lengths(7, 4, 2)[:, :5])


@pytest.mark.parametrize("shared", [False, True])
def test_published_weights_round_trip(shared):
    config = dataclasses.replace(
        DEEP, share_attn_across_layers=shared, mhta=MHTAConfig(qkv_linear=True, gauge="lambda")
    )
    _, params = build(config)
    published = published_weights(params["params"], config)
    assert published["encoder.layers.0.attn.lambda_param"].shape == (1, 1, C)
    assert published["encoder.layers.0.ff.0.weight"].shape == (4 * C, C)
    assert ("encoder.layers.1.attn.out.weight" in published) == (not shared)
    again = named_leaves(set_encoder_params(published, config))
    for name, leaf in named_leaves(params["params"]).items():
        np.testing.assert_array_equal(again[name], leaf)


def test_unknown_published_weights_are_refused():
    with pytest.raises(ValueError, match="layers.7"):
        set_encoder_params({"encoder.layers.7.norm1.weight": np.ones(C)}, SMALL)
    assert "encoder.layers.1.attn.out.weight" not in published_names(
        dataclasses.replace(DEEP, share_attn_across_layers=True)
    )
    unused = {"encoder.last_norm.weight": np.ones(C)}
    assert set_encoder_params(unused, SMALL) == {}
    assert set(set_encoder_params(unused, small(pre_norm=True))) == {"final_norm"}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("model_*.npz")), ids=lambda path: path.stem)
@pytest.mark.thorough
def test_float32_is_near_the_published_models(path):
    golden = Golden.load(path)
    classification = golden.meta["settings"]["classification"]
    config = dataclasses.replace(next(configs(golden, classification))[1], dtype="float32")
    params = set_encoder_params(golden.params, config)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)

    @jax.jit
    def run(params):
        def loss(params):
            y = SetEncoder(config).apply({"params": params}, golden.inputs["x"].astype(np.float32))
            return jnp.sum(y * golden.cotangents["y"].astype(np.float32)), y

        return jax.grad(loss, has_aux=True)(params)

    grads, y = run(params)
    found = {f"grad.{name}": g for name, g in published_weights(grads, config).items()} | {"out.y": y}
    for name, got in found.items():
        want = golden.arrays[name]
        assert np.abs(got - want).max() <= 1e-4 * max(np.abs(want).max(), 1e-3), name
