"""Sampling: filters by hand, the drawn distribution, and generation against the parallel form of the model."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.models import decoding
from attnlab.models.config import ModelConfig
from attnlab.models.decoding import Sampling, filter_logits, generate, generate_groups, jit_generate, left_pad
from attnlab.models.language_model import LanguageModel
from attnlab.objectives.language_modelling import token_losses

PRO = "qk_norm=True, key_shift=True, value_shift=True, output_norm=True, output_gate='sigmoid'"
LAYERS = {
    "softmax": "softmax(implementation='reference')",
    "forgetting": f"forgetting({PRO}, implementation='reference')",
    "windowed": f"softmax(window=5, implementation='reference') + forgetting(window=3, {PRO})",
}
PAD = 40


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These models are tiny: compile them quickly rather than well."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def small_model(layers: str) -> tuple[LanguageModel, dict]:
    """Weights large enough that neighbouring tokens matter and the likeliest token is clear."""
    config = ModelConfig(
        LAYERS[layers], num_layers=2, hidden_size=32, num_heads=2, mlp_size=24, vocab_size=41, init_std=0.3
    )
    model = LanguageModel(config)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@functools.cache
def sampler(layers: str, temperature: float):
    """(params, prompts, starts, keys) -> 11 drawn tokens a row, compiled once for all tests."""
    model, _ = small_model(layers)
    return jit_generate(model, Sampling(max_new_tokens=11, temperature=temperature, vocab_size=40))


def some_prompts(lengths=(3, 7, 1)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, PAD, length) for length in lengths]


class Scripted:
    """A stand-in for a model: always the same logits [V], or those of the last token from a table [V, V]."""

    def __init__(self, logits):
        self.logits = jnp.asarray(logits, jnp.float32)
        self.config = types.SimpleNamespace(scan_layers=False, vocab_size=self.logits.shape[-1])
        self.calls = 0

    def init_cache(self, batch, length, starts):
        return jnp.zeros(())

    def apply(self, variables, tokens, cache, last_only, method):
        assert method == "decode"
        jax.debug.callback(lambda: setattr(self, "calls", self.calls + 1))
        table = (
            self.logits if self.logits.ndim == 2 else jnp.broadcast_to(self.logits, (len(self.logits),) * 2)
        )
        return table[tokens[:, -1:] if last_only else tokens], cache


def draw(logits, rows=1, seed=0, **options):
    prompts = jnp.zeros((rows, 1), jnp.int32)
    starts = jnp.zeros(rows, jnp.int32)
    run = jit_generate(Scripted(logits), Sampling(**options))
    return jax.device_get(run({}, prompts, starts, jax.random.key(seed)))


# --- filters -----------------------------------------------------------------------------------------------


def kept(probabilities, **options) -> list[int]:
    """Ids that are not excluded, after checking that their logits are what temperature made of them."""
    logits = np.log(np.array(probabilities, np.float32))
    filtered = np.asarray(filter_logits(jnp.asarray(logits), **options))
    ids = np.flatnonzero(filtered > -np.inf)
    if options.get("temperature", 1.0):
        np.testing.assert_allclose(filtered[ids], logits[ids] / options.get("temperature", 1.0), rtol=1e-6)
    return ids.tolist()


@pytest.mark.smoke
def test_top_k_keeps_exactly_k():
    assert kept([0.1, 0.5, 0.15, 0.25], top_k=0) == [0, 1, 2, 3]
    assert kept([0.1, 0.5, 0.15, 0.25], top_k=1) == [1]
    assert kept([0.1, 0.5, 0.15, 0.25], top_k=3) == [1, 2, 3]
    assert kept([0.1, 0.5, 0.15, 0.25], top_k=9) == [0, 1, 2, 3]
    assert kept([0.1, 0.3, 0.3, 0.3], top_k=2) == [1, 2], "of equals the lower ids"


def test_top_p_keeps_until_the_mass_is_reached():
    assert kept([0.1, 0.5, 0.15, 0.25], top_p=0.4) == [1]
    assert kept([0.1, 0.5, 0.15, 0.25], top_p=0.51) == [1, 3]
    assert kept([0.1, 0.5, 0.15, 0.25], top_p=0.8) == [1, 2, 3]
    assert kept([0.1, 0.5, 0.15, 0.25], top_p=1e-9) == [1], "the likeliest always stays"
    assert kept([0.1, 0.4, 0.4, 0.1], top_p=0.3) == [1], "of equals the lower id"
    assert kept([0.25, 0.25, 0.25, 0.25], top_p=0.5) == [0, 1], "0.5 is reached by two"


def test_order_is_temperature_then_k_then_p():
    assert kept([0.6, 0.4], top_p=0.65) == [0, 1]
    assert kept([0.6, 0.4], top_p=0.65, temperature=0.5) == [0], "0.36 / 0.52 is enough"
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.55) == [0, 1]
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.55, top_k=2) == [0], "0.4 / 0.7 is enough"


def test_min_p_keeps_what_is_nearly_as_likely_as_the_likeliest():
    assert kept([0.4, 0.3, 0.2, 0.1], min_p=0.45) == [0, 1, 2]
    assert kept([0.1, 0.4, 0.4, 0.1], min_p=1.0) == [1, 2], "equals all stay"
    assert kept([0.6, 0.4], min_p=0.6) == [0, 1]
    assert kept([0.6, 0.4], min_p=0.6, temperature=0.5) == [0], "0.36 and 0.16"
    assert kept([0.4, 0.3, 0.2, 0.1], min_p=0.3, top_k=2) == [0, 1]
    assert kept([0.4, 0.3, 0.2, 0.1], min_p=0.6, top_p=0.5) == [0, 1], (
        "after top_p; before it 0.4 / 0.7 is enough"
    )


def test_temperature_zero_is_the_first_largest_whatever_the_other_filters():
    for options in ({}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.9}):
        assert kept([0.1, 0.3, 0.3, 0.3], temperature=0.0, **options) == [1]


def test_filters_work_on_every_row_and_pass_over_excluded_tokens():
    logits = jnp.array([[[1.0, 2.0, 3.0], [3.0, 2.0, -jnp.inf]]])
    expected = [[[-np.inf, 2.0, 3.0], [3.0, 2.0, -np.inf]]]
    np.testing.assert_array_equal(filter_logits(logits, top_k=2), expected)
    np.testing.assert_array_equal(filter_logits(logits, top_k=3)[0, 1], expected[0][1])


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"min_p": 1.1}],
)
def test_impossible_filters_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        filter_logits(jnp.zeros(3), **options)


# --- what is drawn -----------------------------------------------------------------------------------------


def test_samples_follow_the_filtered_distribution():
    logits = np.log([0.05, 0.3, 0.2, 0.25, 0.1, 0.1, 1e3])  # the last id is no token of the tokeniser
    out = draw(logits, rows=4000, max_new_tokens=2, temperature=0.8, top_k=5, top_p=0.9, vocab_size=6)
    powers = np.array([0.05, 0.3, 0.2, 0.25, 0.1, 0.1]) ** (1 / 0.8)
    expected = np.where(
        [False, True, True, True, True, False], powers, 0
    )  # k leaves 1, 3, 2, 4, 5; p drops id 5
    expected /= expected.sum()
    assert 0.9 * powers[1:].sum() > powers[1:5].sum() - powers[4], "id 4 is needed for 0.9"
    pairs = np.zeros((6, 6))
    np.add.at(pairs, (out.tokens[:, 0], out.tokens[:, 1]), 1)
    wanted = 4000 * np.outer(expected, expected)
    assert pairs[wanted == 0].sum() == 0
    chi_square = (np.square(pairs - wanted)[wanted > 0] / wanted[wanted > 0]).sum()
    assert chi_square < 15 + 4 * np.sqrt(2 * 15), "16 pairs of independent places, 15 degrees of freedom"
    np.testing.assert_allclose(out.logprobs, np.log(expected[out.tokens]), rtol=1e-4)
    raw = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(out.raw_logprobs, raw[out.tokens], rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.5}, {"top_k": 3}, {"top_p": 0.75}, {"temperature": 0.7, "top_p": 0.95, "min_p": 0.2}],
)
def test_twenty_thousand_draws_have_the_frequencies_of_the_distribution(options):
    powers = np.array([0.05, 0.3, 0.2, 0.25, 0.08, 0.12]) ** (1 / options.get("temperature", 1.0))
    filtered = filter_logits(jnp.log(jnp.array([0.05, 0.3, 0.2, 0.25, 0.08, 0.12])), **options)
    stays = np.asarray(filtered) > -np.inf
    wanted = 20_000 * np.where(stays, powers, 0) / powers[stays].sum()
    counts = np.bincount(jax.random.categorical(jax.random.key(3), filtered, shape=(20_000,)), minlength=6)
    assert stays.sum() > 2 and counts[~stays].sum() == 0
    freedom = stays.sum() - 1
    assert (np.square(counts - wanted)[stays] / wanted[stays]).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_forbidden_ids_are_never_drawn_and_stop_ids_not_before_their_time():
    logits = np.array([0.0, 1.0, 9.0, 8.0, 0.5])  # 2 would nearly always be drawn, then 3
    options = {"max_new_tokens": 5, "stop_ids": (3,), "forbidden_ids": (2, 4), "temperature": 2.0}
    out = draw(logits, rows=200, min_new_tokens=3, **options)
    assert set(out.tokens[:, :3].ravel()) == {0, 1} and set(out.lengths) >= {4, 5}
    assert (out.tokens[:, 3] == 3).mean() > 0.9, "it stops as soon as it may"
    assert (draw(logits, rows=200, **options).lengths == 1).mean() > 0.9, "and at once if it may at once"
    early, late = logits[[0, 1]] / 2, logits[[0, 1, 3]] / 2
    np.testing.assert_allclose(
        out.logprobs[:, 0], (early - np.log(np.exp(early).sum()))[out.tokens[:, 0]], rtol=1e-5
    )
    stopped = out.lengths == 4
    np.testing.assert_allclose(
        out.logprobs[stopped, 3], late[2] - np.log(np.exp(late).sum()), rtol=1e-4, atol=1e-6
    )
    every = logits / 2 - np.log(np.exp(logits / 2).sum())
    written = np.arange(5) < out.lengths[:, None]
    np.testing.assert_allclose(out.policy_logprobs, np.where(written, every[out.tokens], 0), rtol=1e-5)


def test_policy_log_probabilities_are_of_all_tokens_before_any_filter():
    logits = np.array([0.0, 1.0, 2.0, 3.0])
    out = draw(logits, rows=50, max_new_tokens=2, temperature=0.5, top_k=2, min_p=0.01, vocab_size=3)
    assert set(out.tokens.ravel()) == {1, 2}
    np.testing.assert_allclose(
        out.policy_logprobs, (2 * logits - np.log(np.exp(2 * logits).sum()))[out.tokens], rtol=1e-5
    )
    greedy = draw(logits, max_new_tokens=2, temperature=0.0, vocab_size=3)
    np.testing.assert_array_equal(greedy.policy_logprobs, greedy.raw_logprobs)


def test_ids_beyond_the_vocabulary_are_never_drawn():
    logits = np.array([0.0, 1.0, 0.5, 50.0, 50.0])
    assert set(draw(logits, rows=50, max_new_tokens=7, vocab_size=3).tokens.ravel()) == {0, 1, 2}
    assert set(draw(logits, rows=50, max_new_tokens=7).tokens.ravel()) == {3, 4}


def test_a_row_ends_with_its_stop_token_and_the_loop_with_the_last_row():
    table = np.full((7, 7), -30.0)
    table[np.arange(7), (np.arange(7) + 1) % 7] = 30.0  # counts upwards
    model = Scripted(table)
    prompts, starts = left_pad([[0], [6, 2]], pad_id=6)
    sampling = Sampling(max_new_tokens=50, stop_ids=(4, 5), pad_id=6)
    out = generate(model, {}, prompts, starts, jax.random.key(0), sampling)
    jax.effects_barrier()
    np.testing.assert_array_equal(out.tokens[:, :5], [[1, 2, 3, 4, 6], [3, 4, 6, 6, 6]])
    assert (np.asarray(out.tokens[:, 4:]) == 6).all()
    np.testing.assert_array_equal(out.lengths, [4, 2])
    assert np.asarray(out.raw_logprobs[1, 2:] == 0).all() and np.asarray(out.logprobs[1, 2:] == 0).all()
    assert model.calls == 4, "one prompt and three steps, as nothing follows the last token"


# --- against the model -------------------------------------------------------------------------------------


def parallel_logits(model, params, prompts, out) -> list[np.ndarray]:
    """Logits [N, V] which the parallel form gives for every drawn token, each row on its own without padding."""
    rows = [np.concatenate([p, np.asarray(t)]) for p, t in zip(prompts, out.tokens, strict=True)]
    width = max(map(len, rows))
    padded = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    logits = np.asarray(jax.jit(model.apply)({"params": params}, padded))
    N = out.tokens.shape[1]
    return [row[len(p) - 1 : len(p) - 1 + N] for row, p in zip(logits, prompts, strict=True)]


@pytest.mark.parametrize("layers", LAYERS)
def test_greedy_is_the_argmax_of_the_parallel_form(layers):
    model, params = small_model(layers)
    prompts = some_prompts()
    out = sampler(layers, 0.0)(params, *left_pad(prompts, PAD), jax.random.split(jax.random.key(0), 3))
    for row, logits in enumerate(parallel_logits(model, params, prompts, out)):
        np.testing.assert_array_equal(out.tokens[row], logits[:, :40].argmax(-1))
    assert len(np.unique(out.tokens)) > 5, "a constant output would prove little"
    assert (np.asarray(out.logprobs) == 0).all(), "there is no choice"


def test_log_probabilities_are_those_of_the_loss():
    model, params = small_model("windowed")
    prompts = some_prompts()
    out = sampler("windowed", 0.7)(params, *left_pad(prompts, PAD), jax.random.split(jax.random.key(1), 3))
    for row, logits in enumerate(parallel_logits(model, params, prompts, out)):
        nll, _ = token_losses(jnp.asarray(logits)[None], out.tokens[row][None])
        np.testing.assert_allclose(out.raw_logprobs[row], -nll[0], rtol=1e-4, atol=1e-4)
        tempered, _ = token_losses(jnp.asarray(logits[:, :40])[None] / 0.7, out.tokens[row][None])
        np.testing.assert_allclose(out.logprobs[row], -tempered[0], rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours_their_order_or_the_padding():
    _, params = small_model("windowed")
    prompts = some_prompts()
    keys = jax.random.split(jax.random.key(5), 3)
    run = sampler("windowed", 0.7)
    out = run(params, *left_pad(prompts, PAD), keys)
    order = np.array([2, 0, 1])
    moved = run(params, *left_pad([prompts[i] for i in order], PAD), keys[order])
    np.testing.assert_array_equal(moved.tokens, out.tokens[order])
    alone = run(params, *left_pad(prompts[:1], PAD, length=5), keys[:1])
    np.testing.assert_array_equal(alone.tokens, out.tokens[:1])
    other = run(params, *left_pad(prompts, PAD), keys[order])
    assert (np.asarray(other.tokens) != np.asarray(out.tokens)).any(), "the keys matter"


def test_groups_are_rows_of_the_same_prompts_read_once():
    model, params = small_model("windowed")
    prompts, starts = left_pad(some_prompts(), PAD)
    keys = jax.random.split(jax.random.key(5), (3, 2))
    sampling = Sampling(max_new_tokens=11, temperature=0.7, vocab_size=40)
    valid = jnp.array([True, False, True])
    grouped = jax.jit(lambda *arguments: generate_groups(model, *arguments, sampling, valid))
    out = grouped(params, prompts, starts, keys)
    for g in range(2):
        alone = sampler("windowed", 0.7)(params, prompts, starts, keys[:, g])
        for name, want in alone._asdict().items():
            np.testing.assert_allclose(getattr(out, name)[::2, g], want[::2], 1e-5, 1e-5, err_msg=name)
    assert (np.asarray(out.tokens[0, 0]) != np.asarray(out.tokens[0, 1])).any(), "a key each"
    assert (out.lengths[1] == 0).all() and (out.tokens[1] == 0).all() and (out.policy_logprobs[1] == 0).all()
    text = str(jax.make_jaxpr(grouped)(params, prompts, starts, keys))
    assert "i32[3,7]" in text and "i32[6,7]" not in text, "prompts are not repeated"


def test_one_key_is_folded_with_the_row_number():
    keys = decoding.row_keys(jax.random.key(7), 3)
    for row in range(3):
        np.testing.assert_array_equal(
            jax.random.key_data(keys[row]), jax.random.key_data(jax.random.fold_in(jax.random.key(7), row))
        )


def test_a_prompt_needs_logits_of_its_last_position_only():
    model, params = small_model("softmax")
    prompts, starts = left_pad(some_prompts((7, 3)), PAD)
    trace = jax.make_jaxpr(lambda *a: generate(model, *a, Sampling(5)))(
        params, prompts, starts, jax.random.key(0)
    )
    assert "[2,1,41]" in str(trace) and "[2,7,41]" not in str(trace)


# --- arguments ---------------------------------------------------------------------------------------------


def test_left_pad():
    prompts, starts = left_pad([[5, 6], [7]], pad_id=9, length=3)
    np.testing.assert_array_equal(prompts, [[9, 5, 6], [9, 9, 7]])
    np.testing.assert_array_equal(starts, [1, 2])
    assert prompts.dtype == starts.dtype == np.int32
    np.testing.assert_array_equal(left_pad([[5, 6], [7]], pad_id=9, length=1)[0], [[5, 6], [9, 7]])
    for empty in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            left_pad(empty, 0)


def test_what_does_not_fit_is_refused():
    sampling = Sampling(max_new_tokens=6, max_length=10)
    sampling.check(4, 41)
    with pytest.raises(
        ValueError, match="prompt of 5 tokens and 6 new ones need 11 positions, above the limit of 10"
    ):
        sampling.check(5, 41)
    with pytest.raises(ValueError, match="vocab_size=42"):
        Sampling(1, vocab_size=42).check(1, 41)
    with pytest.raises(ValueError, match="stop id=99"):
        Sampling(1, stop_ids=(99,)).check(1, 41)
    with pytest.raises(ValueError, match="stop id=41"):
        Sampling(1, stop_ids=(41,)).check(1, 41)
    with pytest.raises(ValueError, match="forbidden id=-1"):
        Sampling(1, forbidden_ids=(-1,)).check(1, 41)
    with pytest.raises(ValueError, match="pad_id=41"):
        Sampling(1, pad_id=41).check(1, 41)
    with pytest.raises(ValueError, match="stop id=3 is also a forbidden id"):
        Sampling(1, stop_ids=(2, 3), forbidden_ids=(3, 4)).check(1, 41)
    with pytest.raises(ValueError, match="leave none of the 3 tokens"):
        Sampling(2, stop_ids=(1,), forbidden_ids=(0, 2), min_new_tokens=1, vocab_size=3).check(1, 41)
    with pytest.raises(ValueError, match="min_new_tokens=3 must lie between 0 and max_new_tokens=2"):
        Sampling(2, min_new_tokens=3).check(1, 41)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        Sampling(0).check(1, 41)
    with pytest.raises(ValueError, match="shape"):
        decoding.row_keys(jax.random.split(jax.random.key(0), 3), 2)
