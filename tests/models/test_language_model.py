"""The language model: sizes of the papers, patterns, layouts, rematerialisation, dtypes, cost formula."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.forgetting import ForgettingConfig
from attnlab.attention.mixer import LayerSpec, parse_pattern, shortest_period
from attnlab.attention.softmax import SoftmaxConfig
from attnlab.models.config import ModelConfig
from attnlab.models.language_model import LanguageModel, forward_flops
from attnlab.models.presets.fox import fox_preset
from attnlab.training.trees import named_leaves

TINY = ModelConfig(
    layers="forgetting*2 + softmax(window=5)",
    num_layers=6,
    hidden_size=22,
    num_heads=2,
    head_dim=10,
    mlp_size=26,
    vocab_size=37,
    init_std=0.2,
)
TOKENS = jax.random.randint(jax.random.key(0), (3, 19), 0, 37)


def change(**fields):
    return dataclasses.replace(TINY, **fields)


def run(config, params=None):
    model = LanguageModel(config)
    params = params or jax.jit(model.init)(jax.random.key(1), TOKENS)
    return jax.jit(model.apply)(params, TOKENS), params


def unrolled(params, periods):
    """Parameters of the scanned layout in the layout of scan_layers=False."""
    inner = params["params"]
    layers = {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], inner["layers"]) for i in range(periods)}
    return {"params": {k: v for k, v in inner.items() if k != "layers"} | layers}


PUBLISHED = {  # all parameters, and without the input embedding
    "fox-llama-125m": (162_259_344, 123_661_968),
    "fox-pro-125m": (162_508_176, 123_910_800),
    "fox-llama-360m": (411_651_456, 360_188_288),
    "fox-pro-360m": (418_803_072, 367_339_904),
    "fox-llama-760m": (834_827_328, 757_632_576),
    "fox-pro-760m": (836_707_392, 759_512_640),
}
SHARED_NORM = {"fox-pro-125m": 162_491_280, "fox-pro-760m": 836_636_736}


def count(config):
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    sizes = {name: math.prod(leaf.shape) for name, leaf in named_leaves(shapes["params"]).items()}
    return sum(sizes.values()), sizes["embedding"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_paper_sizes_have_the_published_parameter_counts(name):
    total, embedding = count(fox_preset(name))
    assert (total, total - embedding) == PUBLISHED[name]


@pytest.mark.parametrize("name", SHARED_NORM)
def test_paper_runs_shared_their_norm_weights_across_heads(name):
    config = fox_preset(name)
    options = dataclasses.replace(config.mixers["forgetting"], qk_norm_shared=True)
    assert count(dataclasses.replace(config, mixers={"forgetting": options}))[0] == SHARED_NORM[name]


def test_transformer_presets_use_the_wider_heads_of_the_paper():
    (_, options), *_ = fox_preset("transformer-pro-760m").layer_configs()
    assert (options.num_heads, options.head_dim, options.gate, options.rope) == (12, 128, "none", True)
    with pytest.raises(ValueError, match="unknown preset 'fox-pro-1b'"):
        fox_preset("fox-pro-1b")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("softmax", ["softmax"]),
        ("forgetting*2 + softmax", ["forgetting", "forgetting", "softmax"]),
        ("(softmax + forgetting)*2", ["softmax", "forgetting"] * 2),
    ],
)
def test_patterns_are_read_in_order(pattern, names):
    assert [spec.name for spec in parse_pattern(pattern)] == names


def test_pattern_options_and_periods():
    specs = parse_pattern("softmax(window=64, rope=False)*2 + softmax")
    assert specs[0] == specs[1] == LayerSpec("softmax", (("rope", False), ("window", 64)))
    assert shortest_period(specs * 3) == specs
    assert shortest_period(parse_pattern("softmax*6")) == parse_pattern("softmax")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("softmx", "did you mean 'softmax'"),
        ("softmax*0", "cannot repeat 0 times"),
        ("softmax - forgetting", "neither a mixer nor"),
        ("softmax +", "is not understood"),
        ("__import__('os')", "neither a mixer nor"),
    ],
)
def test_bad_patterns_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(pattern)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, "num_layers=4 is not a multiple of the 3 layers"),
        ({"layers": "softmax(windw=3)"}, "has no option 'windw'"),
        ({"layers": "softmax(window='x')"}, "wrong type"),
        ({"dtype": "float16"}, "model.dtype='float16' is unknown"),
        ({"dtype": "float64"}, "needs JAX's 64-bit mode"),
        ({"remat": "all"}, "model.remat='all' is unknown"),
        ({"hidden_size": 0}, "model.hidden_size=0"),
        ({"head_dim": 0, "num_heads": 4}, "hidden_size=22 is not a multiple of num_heads=4"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        change(**changes).validate()


def test_vocabulary_is_rounded_up_and_checked():
    assert change(vocab_size=0).with_vocab(259).vocab_size == 320
    assert change(vocab_size=300).with_vocab(259).vocab_size == 300
    with pytest.raises(ValueError, match="vocab_size=200 is below the tokeniser's 259"):
        change(vocab_size=200).with_vocab(259)


@pytest.mark.smoke
def test_scanned_and_unrolled_layers_are_the_same_function():
    logits, params = run(TINY)
    plain, _ = run(change(scan_layers=False), unrolled(params, 2))
    np.testing.assert_allclose(plain, logits, atol=1e-5)
    assert logits.dtype == jnp.float32 and logits.shape == (3, 19, 37)


def test_pattern_options_win_over_the_mixers_defaults():
    mixers = {"softmax": SoftmaxConfig(window=9), "forgetting": ForgettingConfig(qk_norm=True)}
    configs = [options for _, options in change(mixers=mixers).layer_configs()]
    assert [configs[0].qk_norm, configs[2].window] == [True, 5]


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [
        ("parts", True),
        *(
            pytest.param(*values, marks=pytest.mark.thorough)
            for values in (("block", True), ("dots", True), ("parts", False))
        ),
    ],
)
def test_rematerialisation_recomputes_and_changes_nothing(remat, scan_layers):
    config = change(scan_layers=scan_layers, layers="forgetting", num_layers=2)
    _, params = run(config)

    def gradient(config):
        def loss(params):
            return jnp.mean(jnp.square(LanguageModel(config).apply(params, TOKENS)))

        traced = jax.jit(jax.grad(loss)).trace(params)
        return traced.lower().compile()(params), str(traced.jaxpr)

    (want, plain), (got, recomputed) = gradient(config), gradient(dataclasses.replace(config, remat=remat))
    assert recomputed.count("remat") > plain.count("remat")  # the option reaches the program
    for name, value in named_leaves(want).items():
        np.testing.assert_allclose(named_leaves(got)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_options_change_the_logits():
    short = {"layers": "softmax", "num_layers": 1}
    logits, params = run(change(**short))
    soft, _ = run(change(logit_soft_cap=0.5, **short), params)
    np.testing.assert_allclose(soft, 0.5 * np.tanh(logits / 0.5), rtol=1e-4, atol=1e-6)
    tied, tied_params = run(change(tie_embeddings=True, **short))
    assert "head" not in tied_params["params"] and tied.shape == logits.shape
    loose, _ = run(change(norm_eps=1.0, **short), params)
    assert np.abs(loose - logits).max() > 1e-3


def test_bfloat16_activations_keep_float32_parameters_and_logits():
    logits, params = run(change(dtype="bfloat16"))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in named_leaves(params).values()} == {jnp.dtype("float32")}
    wide, _ = run(TINY, params)
    assert 0 < np.abs(logits - wide).max() / np.abs(wide).max() < 5e-2


def test_decoding_equals_the_parallel_form_with_left_padding():
    model = LanguageModel(TINY)
    _, params = run(TINY)
    starts = jnp.array([0, 3, 7])
    want = jax.jit(model.apply)(params, TOKENS, starts=starts)
    decode = jax.jit(lambda p, t, c: model.apply(p, t, c, method="decode"))
    first, cache = decode(params, TOKENS[:, :9], model.init_cache(3, 19, starts))
    second, cache = decode(params, TOKENS[:, 9:18], cache)
    third, _ = decode(params, TOKENS[:, 18:], cache)
    got = jnp.concatenate([first, second, third], axis=1)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(got[row, start:], want[row, start:], atol=2e-5)


@pytest.mark.parametrize("layers", ["softmax", "forgetting"])
def test_flops_formula_matches_the_compiler(layers):
    mixers = {
        "softmax": SoftmaxConfig(implementation="reference"),
        "forgetting": ForgettingConfig(implementation="reference"),
    }
    sizes = {"hidden_size": 128, "head_dim": 64, "mlp_size": 256, "num_layers": 2, "vocab_size": 512}
    config = change(layers=layers, mixers=mixers, scan_layers=False, **sizes)
    model, tokens = LanguageModel(config), jnp.zeros((2, 23), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    counted = jax.jit(model.apply).lower(params, tokens).compile().cost_analysis()["flops"] / tokens.size
    assert 1 <= counted / forward_flops(config, 23, causal=False) < 1.06
    causal = forward_flops(config, 23) - forward_flops(config, 23, causal=False)
    assert causal == 2 * 2 * 2 * 2 * 64 * (12 - 23)  # L x (scores, values) x 2 x H x D x keys saved
