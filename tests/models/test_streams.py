"""Auxiliary streams through the language model: the paper's properties, decoding, packing, padding, limits.

The model has every kind that reads another stream, and others between them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnlab.attention.taylor  # noqa: F401 (registers kinds)
from attnlab.attention.mixer import find_mixer
from attnlab.attention.sourced import FixedMapConfig
from attnlab.models.config import ModelConfig
from attnlab.models.language_model import LanguageModel, compile_fixed_maps
from attnlab.models.streams import StreamConfig, live_streams, poison_beyond, random_rows, source_of
from attnlab.training.trees import named_leaves

ALL = "rndemb_qk + mlp + fixedseq_qk + staticemb_qk + rndemb_qk + softmax"
KINDS = ("softmax", "mlp", "approx", "nonapprox", "rndemb_qk", "fixedseq_qk", "staticemb_qk")
DENSE = {name: find_mixer(name).Config(implementation="reference") for name in KINDS}  # quicker to compile
FIXED = tuple(np.random.default_rng(3).integers(0, 37, 23).tolist())
TINY = ModelConfig(
    layers=ALL,
    num_layers=6,
    hidden_size=22,
    num_heads=2,
    num_kv_heads=1,
    head_dim=10,
    mlp_size=26,
    vocab_size=37,
    init_std=0.2,
    scan_layers=False,
    mixers=DENSE,
    streams=StreamConfig(length=19, sigma=0.5, fixed_tokens=FIXED),
)
TOKENS = jax.random.randint(jax.random.key(0), (3, 19), 0, 37)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These models are tiny: compile them quickly rather than well."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def change(**fields):
    streams = {name: fields.pop(name) for name in list(fields) if name in StreamConfig.__dataclass_fields__}
    return dataclasses.replace(TINY, **fields, streams=dataclasses.replace(TINY.streams, **streams))


def two(pattern, **fields):
    """A model of a short pattern, twice, scanned."""
    return change(
        **({"layers": pattern, "num_layers": 2 * pattern.count("+") + 2, "scan_layers": True} | fields)
    )


# Configs are compared by their text, so that equal ones share one compiled program.
@functools.cache
def _model(text, config=None):
    return LanguageModel(_model.configs[text])


_model.configs = {}


def model(config):
    _model.configs[repr(config)] = config
    return _model(repr(config))


@functools.cache
def _initial(text):
    return jax.jit(_model(text).init)(jax.random.key(1), TOKENS[:1, :2])["params"]


def initial(config):
    model(config)
    return _initial(repr(config))


@functools.cache
def _apply(text, drop):
    return jax.jit(lambda p, t, c: _model(text).apply({"params": p}, t, drop_layers=drop, **c))


def run(config, params=None, tokens=TOKENS, drop=(), **context):
    model(config)
    params = initial(config) if params is None else params
    return _apply(repr(config), drop)(params, tokens, context)


def near(got, want, atol=3e-5):
    np.testing.assert_allclose(got, want, atol=atol, rtol=atol)


# --- what the streams are ----------------------------------------------------------------------------------


def test_models_that_need_no_stream_have_none():
    config = two("softmax")
    assert config.sources() == config.auxiliary() == ()
    bare = dataclasses.replace(config, streams=StreamConfig())
    plain, same = initial(bare), initial(config)
    assert jax.tree.structure(plain) == jax.tree.structure(same) and "random_stream" not in str(plain)
    programs = [jax.jit(model(c).apply).lower({"params": plain}, TOKENS).as_text() for c in (bare, config)]
    assert programs[0] == programs[1]
    (cache,) = model(config).init_cache(3, 7)
    assert list(cache) == ["main"]


def test_needed_streams_are_found_and_end_with_their_last_reader():
    assert TINY.sources() == ("embedding", "random", "text") and TINY.auxiliary() == ("random", "text")
    assert two("staticemb_qk").auxiliary() == ()
    origins = ["random", "", "text", "random", ""]
    assert live_streams(origins) == [
        ("main", "random", "text"),
        ("main", "random", "text"),
        ("main", "random"),
        ("main",),
        ("main",),
    ]
    caches = model(TINY).init_cache(3, 7)[0]
    assert [sorted(cache) for cache in caches] == [
        ["main", "random", "text"],
        ["main", "random", "text"],
        *([["main", "random"]] * 2),
        *([["main"]] * 2),
    ]


def test_sources_of_streams():
    streams, embeddings = {"main": 1, "random": 2, "text": 3}, {"main": 4, "random": 5}
    assert source_of("", "main", streams, embeddings, False) is None
    assert source_of("text", "main", {"main": 1}, None, False) is None  # a model with compiled maps
    assert source_of("random", "random", streams, embeddings, False) is None
    assert source_of("random", "text", streams, embeddings, False) == 2
    assert source_of("embedding", "random", streams, embeddings, False) == 5


def test_random_rows_are_stable_under_longer_tables():
    rows = functools.partial(random_rows, jax.random.key(0), dtype=jnp.float32)
    long = rows(shape=(400, 30), sigma=0.5)
    np.testing.assert_array_equal(rows(shape=(7, 30), sigma=0.5), long[:7])
    np.testing.assert_allclose((long.mean(), long.std()), (0, 0.5), atol=0.02)
    assert len(np.unique(long)) > 11_000  # rows differ, of 12,000 float32 numbers


def test_a_longer_random_stream_changes_no_logits():
    config = two("rndemb_qk + mlp")
    longer = two("rndemb_qk + mlp", length=31)
    assert initial(longer)["frozen_random_stream"].shape == (31, 22)
    np.testing.assert_array_equal(run(longer), run(config))


# --- the paper's properties (spec 7.2 - 7.5) ---------------------------------------------------------------


@pytest.mark.parametrize(("kind", "other"), [("rndemb_qk", "nonapprox"), ("fixedseq_qk", "approx")])
def test_a_fixed_map_model_is_a_softmax_model_on_its_own_source(kind, other):
    config, plain = two(f"{kind} + {other}"), two(f"softmax(rope_theta=1e6) + {other}")
    params = dict(initial(config))
    eps = params.pop("frozen_random_stream", None)
    tokens = jnp.array([FIXED[:19]]) if eps is None else jnp.arange(19)[None]
    if eps is not None:  # tokens whose embeddings are eps
        params["embedding"] = params["embedding"].at[:19].set(eps)
    want = run(plain, params, tokens)
    extra = {} if eps is None else {"frozen_random_stream": eps}
    near(run(config, params | extra, tokens), want)


@pytest.mark.parametrize("kind", ["rndemb_qk", "fixedseq_qk"])
def test_rows_of_a_batch_and_prefixes_stand_alone(kind):
    config = two(f"{kind} + softmax")
    whole = run(config)
    near(run(config, tokens=TOKENS[1:2]), whole[1:2])
    near(run(config, tokens=TOKENS[:, :11]), whole[:, :11])


def test_all_kinds_are_causal_to_the_bit():
    later = TOKENS.at[:, 11:].set(5)
    np.testing.assert_array_equal(run(TINY, tokens=later)[:, :11], run(TINY)[:, :11])
    assert np.abs(run(TINY, tokens=later)[:, 11:] - run(TINY)[:, 11:]).max() > 1e-3


def gradients(config, params):
    loss = lambda p: jnp.sum(jnp.sin(model(config).apply({"params": p}, TOKENS)))  # noqa: E731
    return named_leaves(jax.jit(jax.grad(loss))(params))


def test_stopped_maps_send_no_gradient_down():
    """Of two layers, the first is seen by the second's map through X alone, so only its values' path is left."""
    config = change(layers="rndemb_qk", num_layers=2)
    stopped = change(layers="rndemb_qk", num_layers=2, stop_grad_x=True)
    params = initial(config)
    np.testing.assert_array_equal(run(stopped, params), run(config, params))
    free, held = gradients(config, params), gradients(stopped, params)
    lower = "layers_0/blocks_0/mlp/up/kernel"
    assert np.abs(free[lower] - held[lower]).max() > 1e-4  # the stream's share is gone
    cut = jax.tree.map(jnp.zeros_like, params["layers_1"]["blocks_0"]["mixer"])  # no values: no main path
    mixer = params["layers_1"]["blocks_0"]["mixer"] | {"out": cut["out"]}
    blind = params | {"layers_1": {"blocks_0": params["layers_1"]["blocks_0"] | {"mixer": mixer}}}
    np.testing.assert_allclose(gradients(config, blind)[lower], gradients(stopped, blind)[lower], atol=1e-4)
    upper = "layers_1/blocks_0/mixer/query/kernel"
    np.testing.assert_allclose(free[upper], held[upper], atol=1e-5)


def test_the_random_stream_is_trained_only_if_asked():
    config, trained = two("rndemb_qk"), two("rndemb_qk", train_eps=True)
    params = initial(config)
    assert np.all(gradients(config, params)["frozen_random_stream"] == 0)
    eps = {name.removeprefix("frozen_"): x for name, x in params.items()}
    assert np.any(gradients(trained, eps)["random_stream"] != 0)
    np.testing.assert_array_equal(run(trained, eps), run(config, params))


def test_the_text_stream_reads_the_trained_embedding():
    params = initial(two("fixedseq_qk"))
    moved = params | {"embedding": params["embedding"].at[FIXED[4]].add(1.0)}
    tokens = jnp.full((1, 19), 36 if FIXED[4] != 36 else 35)
    changed = np.abs(run(two("fixedseq_qk"), moved, tokens) - run(two("fixedseq_qk"), params, tokens))
    first = FIXED.index(FIXED[4])
    assert np.all(changed[:, :first] < 1e-6)


def test_static_keys_make_the_first_layer_softmax_and_ignore_hidden_states():
    one, softmax = (change(layers=l, num_layers=1) for l in ("staticemb_qk", "softmax(rope_theta=1e6)"))
    near(run(one), run(softmax, initial(one)))
    for norm in ("layer", "none", "own"):
        config = change(layers=f"staticemb_qk(static_norm='{norm}')", num_layers=2)
        assert np.all(np.isfinite(run(config)))
    with_norm, raw = (
        change(layers=f"staticemb_qk(static_norm='{n}')", num_layers=2) for n in ("layer", "none")
    )
    assert np.abs(run(with_norm) - run(raw, initial(with_norm))).max() > 1e-3


def test_mlp_models_see_one_token_at_a_time():
    config = two("mlp")
    shuffled = TOKENS[:, ::-1]
    near(run(config, tokens=shuffled), run(config)[:, ::-1])


# --- forms of the same model -------------------------------------------------------------------------------


@pytest.mark.parametrize(("scan_layers", "starts"), [(False, (0, 4, 11)), (True, None)])
def test_decoding_equals_the_parallel_form(scan_layers, starts):
    config = TINY if not scan_layers else two("rndemb_qk + staticemb_qk + fixedseq_qk")
    params, lm = initial(config), model(config)
    starts = None if starts is None else jnp.array(starts)
    want = run(config, params, starts=starts)
    decode = jax.jit(lambda p, t, c: lm.apply({"params": p}, t, c, method="decode"))
    cache, outputs = lm.init_cache(3, 19, starts), []
    for a, b in ((0, 9), (9, 18), (18, 19)):
        logits, cache = decode(params, TOKENS[:, a:b], cache)
        outputs.append(logits)
    got = jnp.concatenate(outputs, axis=1)
    for row, start in enumerate((0, 0, 0) if starts is None else starts):
        near(got[row, start:], want[row, start:], 1e-4)


def test_scanned_and_unrolled_layers_are_the_same_function():
    pattern = "rndemb_qk + staticemb_qk + fixedseq_qk"
    scanned, plain = two(pattern), two(pattern, scan_layers=False)
    params = dict(initial(scanned))
    layers = params.pop("layers")
    unrolled = params | {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(2)}
    near(run(plain, unrolled), run(scanned))


@pytest.mark.thorough
@pytest.mark.parametrize("remat", ["block", "parts"])
def test_rematerialisation_changes_nothing(remat):
    config = two("rndemb_qk")
    want, got = (gradients(c, initial(config)) for c in (config, dataclasses.replace(config, remat=remat)))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_padded_and_packed_rows_read_the_rows_of_their_positions():
    starts = jnp.array([0, 4, 11])
    padded = run(TINY, starts=starts)
    alone = [run(TINY, tokens=TOKENS[i : i + 1, s:])[0] for i, s in enumerate((0, 4, 11))]
    for row, start in enumerate((0, 4, 11)):
        near(padded[row, start:], alone[row], 1e-4)
    positions = jnp.array([[*range(8), *range(11)]])
    segments = jnp.array([[1] * 8 + [2] * 11] * 3)
    packed = run(TINY, positions=positions, segments=segments)
    apart = [run(TINY, tokens=part) for part in (TOKENS[:, :8], TOKENS[:, 8:])]
    near(packed, jnp.concatenate(apart, axis=1), 1e-4)


def test_bfloat16_stays_close():
    config = two("rndemb_qk + fixedseq_qk")
    wide, narrow = run(config), run(dataclasses.replace(config, dtype="bfloat16"), initial(config))
    assert 0 < np.abs(wide - narrow).max() / np.abs(wide).max() < 6e-2


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_compiled_maps_replace_the_streams(scan_layers):
    config = two("rndemb_qk + fixedseq_qk", scan_layers=scan_layers, num_layers=4 if scan_layers else 2)
    params, lm, starts = initial(config), model(config), jnp.array([0, 4, 11])
    maps = jax.jit(functools.partial(compile_fixed_maps, config))(params)
    apply = jax.jit(lambda v, t, s: lm.apply(v, t, starts=s))
    near(apply({"params": params} | maps, TOKENS[:, :11], None), run(config, params, TOKENS[:, :11]))
    padded = run(config, params, starts=starts)
    decode = jax.jit(lambda v, t, c: lm.apply(v, t, c, method="decode"))
    cache = lm.init_cache(3, 19, starts, fixed_maps=True)
    first, cache = decode({"params": params} | maps, TOKENS[:, :18], cache)
    last, _ = decode({"params": params} | maps, TOKENS[:, 18:], cache)
    for row, start in enumerate(starts):
        near(jnp.concatenate([first, last], axis=1)[row, start:], padded[row, start:], 1e-4)


def test_models_without_streams_have_no_maps():
    with pytest.raises(ValueError, match="no layer of 'softmax' has a fixed map"):
        compile_fixed_maps(two("softmax"), {})


# --- limits ------------------------------------------------------------------------------------------------


def test_positions_beyond_the_streams_are_refused_or_poisoned():
    short = two("rndemb_qk + fixedseq_qk", length=7)
    with pytest.raises(ValueError, match="19 positions are more than the 7 of the random and text stream"):
        run(short)
    with pytest.raises(ValueError, match="a cache of 9 positions is longer than the 7"):
        model(short).init_cache(1, 9)
    positions = jnp.array([[*range(9), *range(10)]])
    segments = jnp.array([[1] * 9 + [0] * 10] * 3)
    logits = run(short, positions=positions, segments=segments)
    assert np.all(np.isfinite(logits[:, :7])) and np.all(np.isnan(logits[:, 7:9]))
    assert np.all(np.isfinite(logits[:, 9:]))  # padding
    near(logits[:, :7], run(short, tokens=TOKENS[:, :7]))


def test_poison_reaches_the_positions_beyond_alone():
    y = poison_beyond(jnp.ones((2, 3, 4)), jnp.array([[0, 5, 9]]), None, 5)
    np.testing.assert_array_equal(np.isnan(y[..., 0]), [[False, True, True]] * 2)


@pytest.mark.parametrize(
    ("streams", "layers", "message"),
    [
        ({"length": 0}, "rndemb_qk", "needs the random stream, but model.streams.length is 0"),
        (
            {"fixed_tokens": ()},
            "fixedseq_qk",
            "needs the text stream, but model.streams.fixed_tokens is empty",
        ),
    ],
)
def test_missing_streams_are_named(streams, layers, message):
    with pytest.raises(ValueError, match=message):
        run(two(layers, **streams))


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ({"length": -1}, "length=-1"),
        ({"sigma": -0.5}, "sigma=-0.5"),
        ({"fixed_tokens": (3, -2)}, "holds -2"),
        ({"fixed_tokens": (40,)}, "holds token 40, but the vocabulary has 37"),
    ],
)
def test_bad_streams_are_refused(streams, message):
    with pytest.raises(ValueError, match=message):
        change(**streams).validate()


# --- dropped layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_dropped_layers_are_the_model_of_the_others(scan_layers):
    config = two("rndemb_qk + softmax + fixedseq_qk", scan_layers=scan_layers)
    params = initial(config)

    def part(period, block):
        if not scan_layers:
            return params[f"layers_{period}"][f"blocks_{block}"]
        return jax.tree.map(lambda x: x[period], params["layers"][f"blocks_{block}"])

    rest = {name: x for name, x in params.items() if not name.startswith("layers")}
    smaller = change(layers="softmax", num_layers=2)
    kept = {f"layers_{i}": {"blocks_0": part(i, 1)} for i in range(2)}
    near(run(config, drop=frozenset({1, 3, 4, 6})), run(smaller, rest | kept))
    single = change(layers="softmax + rndemb_qk + softmax", num_layers=3)
    kept = {
        "layers_0": {
            "blocks_0": part(0, 1),
            "blocks_1": part(1, 0),
            "blocks_2": part(1, 1),
        }
    }
    near(run(config, drop=frozenset({1, 3, 6})), run(single, rest | kept))


def test_dropped_layers_must_exist():
    with pytest.raises(ValueError, match="drop_layers has 9, but layers are numbered 1 to 6"):
        run(TINY, drop=(2, 9))


def test_options_reach_the_layers():
    mixers = DENSE | {"rndemb_qk": FixedMapConfig(rope=False)}
    config = two("rndemb_qk", mixers=mixers)
    assert np.abs(run(config) - run(two("rndemb_qk"), initial(config))).max() > 1e-3
