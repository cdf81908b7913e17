"""Synthesizer mixers: the shared contract, their options, and the maps they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import position_mixing, table_mixing
from attnlab.attention.indicators import attention_map
from attnlab.attention.mixer import find_mixer
from attnlab.attention.synthesizer import (
    SynthDenseFactConfig,
    synth_dense,
    synth_dense_fact,
    synth_mix,
    synth_random,
    synth_random_fact,
)
from attnlab.training.trees import named_leaves
from kernels.masks import Mask
from tests.attention.contract import B, C, T, apply, build, decode, inputs, variants
from tests.attention.test_controls import FrozenContract, LightContract

N = 41


@variants(frozen_grouped={"max_length": N, "trainable": False, "num_heads": 4, "num_kv_heads": 2})
class TestSynthRandom(FrozenContract):
    name = "synth_random"


@variants(grouped={"max_length": N, "num_heads": 4, "num_kv_heads": 2, "rank": 3})
class TestSynthRandomFact(LightContract):
    name = "synth_random_fact"


@variants(grouped={"max_length": N, "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True})
class TestSynthDense(LightContract):
    name = "synth_dense"


@variants(wide={"max_length": N, "factor_a": 5})
class TestSynthDenseFact(LightContract):
    name = "synth_dense_fact"


@variants(normed={"max_length": N, "num_heads": 4, "num_kv_heads": 2, "qk_norm": True})
class TestSynthMix(LightContract):
    name = "synth_mix"


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_the_maps_are_the_softmaxes_of_their_logits():
    """Each as its definition, row t over the keys j <= t."""
    H, D, S = 3, 5, 13
    causal = jnp.tril(jnp.ones((S, S), bool))
    table, r1, r2 = draw(H, N, N), draw(H, N, 4, seed=1), draw(H, N, 4, seed=2)
    a, w2, b2 = draw(1, S, H, D, seed=3), draw(H, D, N, seed=4), draw(H, N, seed=5)
    A, Bm = draw(1, S, H, 6, seed=6), draw(1, S, H, 7, seed=7)
    q, k, alpha = draw(1, S, H, D, seed=8), draw(1, S, H, D, seed=9), jnp.float32(0.7)
    j, g = jnp.arange(S), jax.nn.sigmoid(alpha)
    dense = jnp.einsum("btha,haj->bhtj", jax.nn.relu(a), w2[..., :S])[0] + b2[:, None, :S]
    product = jnp.einsum("bthj,bthj->bhtj", A[..., j % 6], Bm[..., j // 6])[0]
    dots = jnp.einsum("bthd,bjhd->bhtj", q, k)[0] / jnp.sqrt(D)
    cases = (
        (table[:, :S, :S], lambda v: synth_random(table, v)),
        ((r1 @ r2.swapaxes(1, 2))[:, :S, :S], lambda v: synth_random_fact(r1, r2, v)),
        (dense, lambda v: synth_dense(a, w2, b2, v)),
        (product, lambda v: synth_dense_fact(A, Bm, v)),
        ((1 - g) * dots + g * table[:, :S, :S], lambda v: synth_mix(q, k, table, alpha, v)),
    )
    maps = jax.jit(lambda: [attention_map(call, 1, S, H)[0] for _, call in cases])()
    for (logits, _), got in zip(cases, maps, strict=True):
        want = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf), axis=-1)
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_blocks_of_rows_change_neither_outputs_nor_gradients(monkeypatch):
    monkeypatch.setattr(table_mixing, "BLOCK", 4)
    table, v = draw(4, N, N), draw(3, 23, 2, 5, seed=2)
    segments = jnp.array([[1] * 9 + [2] * 14, [1] * 20 + [0] * 3, [0] * 3 + [4] * 20])
    positions = jnp.stack([jnp.r_[0:9, 0:14], jnp.r_[0:20, 0:3], jnp.r_[0:3, 0:20]])
    mask = Mask(q_segments=segments, kv_segments=segments)
    options = {"mask": mask, "q_positions": positions, "kv_positions": positions}

    def loss(table, v, implementation):
        o = synth_random(table, v, implementation=implementation, **options)
        return jnp.sum(jnp.sin(o) * jnp.arange(5)), o

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    for got, want in zip(
        jax.tree.leaves(run(table, v, "blockwise")), jax.tree.leaves(run(table, v, "reference")), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_shared_positions_other_than_the_leading_ones_are_read():
    """One row of positions for the whole batch takes the short way only if it is 0, 1, 2, ..."""
    table, v, at = draw(2, N, N), draw(3, 7, 2, 5, seed=2), jnp.array([[0, 1, 2, 3, 8, 9, 30]])
    rolled = table[:, at[0]][:, :, at[0]]
    got = jax.jit(lambda at: synth_random(table, v, q_positions=at, kv_positions=at))(at)
    np.testing.assert_allclose(got, synth_random(rolled, v), atol=1e-6)


def test_a_table_made_longer_begins_with_the_shorter_one():
    draw_table = jax.jit(table_mixing.random_table(1.0), static_argnums=1)
    short, long = (draw_table(jax.random.key(4), (2, n, m)) for n, m in ((9, 11), (N, 60)))
    np.testing.assert_array_equal(long[:, :9, :11], short)
    assert abs(float(jnp.std(long)) - 1) < 0.05 and abs(float(jnp.mean(long))) < 0.05
    assert abs(float(jnp.corrcoef(long[0].ravel(), long[1].ravel())[0, 1])) < 0.1


def test_tables_start_with_the_widths_of_their_definitions():
    for trainable, std in ((True, 0.02), (False, 1.0)):
        params = build("synth_random", max_length=N, trainable=trainable)[1]["params"]
        assert abs(float(jnp.std(params["table" if trainable else "frozen_table"])) / std - 1) < 0.1
    params = build("synth_random_fact", max_length=200, num_heads=4)[1]["params"]
    logits = params["row_factor"] @ params["column_factor"].swapaxes(1, 2)
    assert abs(float(jnp.std(logits)) - 1) < 0.1  # unit variance


SYNTHESIZERS = ("synth_random", "synth_random_fact", "synth_dense", "synth_dense_fact", "synth_mix")


@pytest.mark.parametrize("name", (*SYNTHESIZERS, "token_mlp", "mixit", "fnet"))
def test_inputs_longer_than_the_table_are_refused(name):
    cls = find_mixer(name)
    module = cls(config=cls.Config(max_length=T).resolve(2, 0, 10, C), hidden_size=C)
    positions = jnp.arange(T + 1)[None]
    with pytest.raises(ValueError, match=f"{T + 1} positions do not fit max_length={T}; raise max_length"):
        jax.eval_shape(lambda x: module.init(jax.random.key(0), x, positions=positions), inputs(T + 1))
    with pytest.raises(ValueError, match=f"{T + 1} positions do not fit max_length={T}"):
        module.init_cache(1, T + 1)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        cls.Config(max_length=0).resolve(2, 0, 10, C)


@pytest.mark.parametrize("name", ["synth_random", "synth_random_fact", "fnet"])
def test_positions_past_the_table_are_not_silent(name):
    module, params = build(name, max_length=T)
    y = apply(module, params, inputs(), positions=jnp.arange(T)[None] + 2)
    assert np.all(np.isnan(y[:, -2:])) and np.all(np.isfinite(y[:, :-2]))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("synth_random", {"qkv_bias": True}),
        ("synth_random", {"trainable": False}),
        ("synth_random_fact", {"rank": 5}),
        ("synth_random_fact", {"trainable": False}),
        ("synth_dense_fact", {"factor_a": 6}),
        ("synth_dense_fact", {"factor_b": 9}),
        ("synth_mix", {"qk_norm": True}),
        ("token_mlp", {"gate": True}),
    ],
)
def test_every_option_of_the_parameters_changes_them(name, changes):
    def shapes(**options):
        cls = find_mixer(name)
        module = cls(config=cls.Config(max_length=N, **options).resolve(2, 0, 10, C), hidden_size=C)
        call = functools.partial(module.init, positions=jnp.arange(T)[None])
        return {
            n: x.shape for n, x in named_leaves(jax.eval_shape(call, jax.random.key(0), inputs())).items()
        }

    assert shapes() != shapes(**changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("synth_mix", {"rope": False}),
        ("mixit", {"mix_scale": 2.0}),
        ("mixit", {"add_identity": False}),
        ("mixit", {"sink_head0": True}),
        ("fnet", {"row": "N"}),
        ("fnet", {"max_length": 50}),
    ],
)
def test_every_other_option_changes_the_output(name, changes):
    module, params = build(name, max_length=N)
    changed = module.clone(config=dataclasses.replace(module.config, **changes))
    assert np.abs(apply(changed, params, inputs()) - apply(module, params, inputs())).max() > 1e-4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("synth_random_fact", {"rank": 0}, "rank=0 must be at least 1"),
        (
            "synth_dense_fact",
            {"max_length": 20, "factor_a": 4, "factor_b": 4},
            "factor_a=4 times factor_b=4 does not",
        ),
        ("synth_mix", {"window": 4}, "window=4 has no form in synth_mix"),
        ("synth_mix", {"sink": "zero"}, "sink='zero' has no form in synth_mix"),
        ("synth_mix", {"head_dim": 7}, "even head_dim, got 7"),
    ],
)
def test_bad_options_are_refused_with_their_values(name, options, message):
    with pytest.raises(ValueError, match=message):
        find_mixer(name).Config(**options).resolve(2, 0, 10, C)


def test_factors_cover_the_length():
    for length, a, b, want in (
        (41, 0, 0, (7, 7)),
        (49, 0, 0, (7, 7)),
        (41, 5, 0, (5, 9)),
        (41, 0, 4, (11, 4)),
    ):
        assert SynthDenseFactConfig(max_length=length, factor_a=a, factor_b=b).factors == want


def test_values_are_all_a_cache_keeps():
    module, params = build("synth_random", max_length=N)
    _, cache = decode(module, params, inputs(), (T,), length=30)
    assert cache.key.size == 0 and cache.value.shape == (B, 30, 2, 10)


def test_pure_functions_refuse_what_does_not_fit():
    table, v = draw(4, 9, 9), draw(1, 7, 3, 5)
    with pytest.raises(ValueError, match="H=4 heads of the table must be a multiple of the K=3 value heads"):
        synth_random(table, v)
    with pytest.raises(ValueError, match="11 positions do not fit a table of 9"):
        synth_random(table, draw(1, 11, 2, 5))
    with pytest.raises(ValueError, match="q_positions and kv_positions belong together"):
        synth_random(table, draw(1, 7, 2, 5), q_positions=jnp.arange(7)[None])
    with pytest.raises(ValueError, match=r"kv_positions is int32\[1, 6\], expected Int\[_ S\] with S=7"):
        synth_random(
            table, draw(1, 7, 2, 5), q_positions=jnp.arange(6)[None], kv_positions=jnp.arange(6)[None]
        )
    with pytest.raises(
        ValueError, match=r"q_positions \(2, 7\) and kv_positions \(2, 7\) need 1 or B=1 rows"
    ):
        two = jnp.zeros((2, 7), jnp.int32)
        synth_random(table, draw(1, 7, 2, 5), q_positions=two, kv_positions=two)
    assert position_mixing.LARGEST_PERIOD**2 < 2**31 < (position_mixing.LARGEST_PERIOD + 1) ** 2
