"""Rollouts: what is drawn, that it depends on a prompt's number alone, and that the trainer's pass agrees with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.mixer import MIXERS
from attnlab.data.tokenizers import ByteTokenizer
from attnlab.models.config import ModelConfig
from attnlab.models.decoding import left_pad
from attnlab.models.language_model import LanguageModel
from attnlab.models.streams import StreamConfig
from attnlab.rl.config import RLWarning, RolloutConfig
from attnlab.rl.rollout import Rollout, completion_keys, completion_texts, roll_out, score_tokens
from attnlab.training.sharding import MeshConfig, make_mesh, tree_shardings
from tests.models.test_decoding import Scripted, quick_compilation  # noqa: F401 (a fixture)

P, N, V, G, PAD = 5, 7, 16, 2, 15
STOPS = (3, 4, 5)
TEMPERATURE = 1.7
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
# One a paper in every run of the tests, the others in the thorough one.
QUICK = (
    "softmax", "forgetting", "cosformer", "softplus", "inverse_distance", "native_hybrid", "tropical", "approx",
)  # fmt: skip


@functools.cache
def small_model(layers: str, number: int = 1, **options) -> tuple[LanguageModel, dict]:
    """Random weights, large enough that neighbouring tokens matter."""
    streams = StreamConfig(length=P + N, sigma=1.0, fixed_tokens=tuple(5 * n % V for n in range(P + N)))
    sizes = {"hidden_size": 16, "num_heads": 2, "mlp_size": 8, "vocab_size": V, "streams": streams}
    model = LanguageModel(ModelConfig(layers, number, **sizes, **options))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape, leaf.dtype), shapes)


def roll(model, params, prompts, starts, key, prompt_ids, valid=None, **options):
    config = RolloutConfig(P, N, **{"temperature": TEMPERATURE} | options)
    drawn = {"stop_ids": STOPS, "pad_id": PAD, "vocab_size": V - 1, "forbidden_ids": (0,), "valid": valid}
    return roll_out(model, params, prompts, starts, key, prompt_ids, config, G, **drawn)


@functools.cache
def compiled_roll():
    """(prompts, starts, key, prompt_ids, valid) -> Rollout of one small model, compiled once for all tests."""
    model, params = small_model("softmax(window=5)")
    run = jax.jit(lambda params, *inputs: roll(model, params, *inputs))
    return functools.partial(run, params)


def inputs(order=(0, 1, 2), key=3):
    """Prompts in some order, each with its own number, all of them valid."""
    prompts, starts = left_pad([PROMPTS[q] for q in order], PAD, P)
    return prompts, starts, jax.random.key(key), np.array(order, np.int32) + 100, np.ones(len(order), bool)


# --- against the trainer's pass ----------------------------------------------------------------------------


def assert_trainer_agrees(layers: str, number: int = 1, **options) -> None:
    model, params = small_model(layers, number, **options)

    @jax.jit
    def both(params, prompts, starts, key, prompt_ids, valid):
        drawn = roll(model, params, prompts, starts, key, prompt_ids, valid)
        return drawn, score_tokens(model, params, prompts, starts, drawn.ids, drawn.mask, TEMPERATURE)

    drawn, (logp, entropy) = jax.device_get(both(params, *inputs()))
    assert ((drawn.lengths > 1) & (drawn.lengths < N)).any(), "some row must stop in the middle"
    assert drawn.logp.std() > 0.1, "equal log-probabilities would prove little"
    np.testing.assert_allclose(logp, drawn.logp, atol=1e-5)
    assert (logp[~drawn.mask] == 0).all() and (entropy[~drawn.mask] == 0).all()
    assert (entropy[drawn.mask] > 0).all() and (entropy <= np.log(V)).all()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in sorted(MIXERS)],
)
def test_the_trainers_log_probabilities_are_the_samplers(name):
    assert_trainer_agrees(name, scan_layers=False)  # unrolled compiles sooner


@pytest.mark.thorough
@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_trainer_agrees_on_patterns_and_streams(scan_layers):
    pattern = "forgetting(key_shift=True, window=3) + rndemb_qk + native_hybrid + fixedseq_qk"
    assert_trainer_agrees(pattern, 8, scan_layers=scan_layers)


def test_scores_are_those_of_dense_logits_and_what_follows_the_end_is_nothing():
    model, params = small_model("forgetting", tie_embeddings=True, logit_soft_cap=5.0)
    rng = np.random.default_rng(2)
    prompts, starts, *_ = inputs()
    ids = rng.integers(0, V, (3, G, N))
    lengths = np.array([[3, N], [0, 1], [5, 2]])  # one row has no token at all
    mask = np.arange(N) < lengths[..., None]
    weights = rng.standard_normal((2, 3, G, N)).astype(np.float32)

    @jax.jit
    def run(params, ids):
        def total(params):
            logp, entropy = score_tokens(model, params, prompts, starts, ids, mask, TEMPERATURE)
            return (weights[0] * logp + weights[1] * entropy).sum(), (logp, entropy)

        tokens = jnp.concatenate([jnp.repeat(prompts, G, axis=0), ids.reshape(-1, N)], axis=1)
        logits = model.apply({"params": params}, tokens, starts=jnp.repeat(starts, G))
        return jax.value_and_grad(total, has_aux=True)(params), logits

    ((value, (logp, entropy)), gradients), logits = jax.device_get(run(params, ids))
    x = logits.astype(np.float64).reshape(3, G, P + N, V)[:, :, P - 1 : -1] / TEMPERATURE
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    want = np.take_along_axis(x, ids[..., None], -1)[..., 0]
    np.testing.assert_allclose(logp, np.where(mask, want, 0), atol=1e-5)
    np.testing.assert_allclose(entropy, np.where(mask, -(np.exp(x) * x).sum(-1), 0), atol=1e-5)
    leaves = jax.tree.leaves(gradients)
    assert all(np.isfinite(leaf).all() for leaf in leaves) and all(leaf.any() for leaf in leaves)
    others = np.where(mask, ids, rng.integers(0, V, ids.shape))
    (again, _), gradients_again = run(params, others)[0]
    assert again == value
    jax.tree.map(np.testing.assert_array_equal, gradients_again, gradients)


def test_entropy_is_left_out_and_the_implementation_passed_on():
    model, params = small_model("softmax")
    arguments = (*inputs()[:2], jnp.zeros((3, G, N), jnp.int32), jnp.ones((3, G, N), bool), TEMPERATURE)
    logp, entropy = jax.eval_shape(
        lambda params: score_tokens(model, params, *arguments, return_entropy=False), params
    )
    assert logp.shape == (3, G, N) and entropy is None
    with pytest.raises(ValueError, match="no_such"):
        jax.eval_shape(
            lambda params: score_tokens(model, params, *arguments, implementation="no_such"), params
        )


# --- what is drawn -----------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_completion_ends_with_its_stop_token_or_is_truncated():
    drawn = jax.device_get(compiled_roll()(*inputs()))
    assert drawn.truncated.any() and not drawn.truncated.all()
    assert drawn.ids.shape == (3, G, N) and drawn.ids.dtype == np.int32
    for ids, mask, length, truncated in zip(
        drawn.ids.reshape(-1, N),
        drawn.mask.reshape(-1, N),
        drawn.lengths.flat,
        drawn.truncated.flat,
        strict=True,
    ):
        stops = np.flatnonzero(np.isin(ids, STOPS))
        assert truncated == (stops.size == 0)
        assert length == (N if truncated else stops[0] + 1)
        np.testing.assert_array_equal(mask, np.arange(N) < length)
        assert (ids[length:] == PAD).all() and not np.isin(ids[:length], (0, PAD)).any()
    for values in (drawn.logp, drawn.filtered_logp):
        assert (values[~drawn.mask] == 0).all() and (values[drawn.mask] < 0).all()
    assert (drawn.filtered_logp >= drawn.logp).all(), "forbidden tokens leave more for the others"


def test_a_completion_depends_on_its_prompts_number_and_not_on_its_place():
    drawn = jax.device_get(compiled_roll()(*inputs()))
    order = (2, 0, 1)
    moved = jax.device_get(compiled_roll()(*inputs(order)))
    prompts, starts, key, numbers, valid = inputs((0, 2, 2))
    padded = jax.device_get(compiled_roll()(prompts, starts, key, numbers, valid & [True, True, False]))
    for name, want in drawn._asdict().items():
        np.testing.assert_allclose(getattr(moved, name), want[list(order)], atol=1e-6, err_msg=name)
        np.testing.assert_allclose(getattr(padded, name)[:2], want[[0, 2]], atol=1e-6, err_msg=name)
    assert not padded.mask[2].any() and (padded.ids[2] == PAD).all() and not padded.truncated[2].any()
    other = compiled_roll()(*inputs(key=4))
    assert (other.ids != drawn.ids).any(axis=(1, 2)).all(), "the key matters"


def test_equal_prompts_and_the_rows_of_a_group_differ():
    prompts, starts, key, _, valid = inputs((0, 0, 0))
    drawn = jax.device_get(compiled_roll()(prompts, starts, key, np.array([7, 8, 7], np.int32), valid))
    np.testing.assert_array_equal(drawn.ids[0], drawn.ids[2])
    assert len({tuple(row) for row in drawn.ids[:2].reshape(-1, N)}) == 4


def test_keys_are_those_of_the_completions_numbers():
    keys = completion_keys(jax.random.key(5), jnp.array([9, 4]), 3)
    want = [[jax.random.fold_in(jax.random.key(5), 3 * q + g) for g in range(3)] for q in (9, 4)]
    np.testing.assert_array_equal(
        jax.random.key_data(keys), [[jax.random.key_data(k) for k in r] for r in want]
    )


def test_stopping_early_changes_nothing_and_padding_may_be_the_stop_token():
    table = np.full((9, 9), -30.0)
    table[np.arange(9), [0, 2, 3, 4, 5, 6, 7, 8, 8]] = 30.0  # counts to 8 and stays; 0 stays
    model = Scripted(table)

    def run(prompts, numbers):
        config = RolloutConfig(1, 40)
        options = {"stop_ids": (8,), "pad_id": 8}
        starts = jnp.zeros(len(prompts), jnp.int32)
        roll = jax.jit(lambda *a: roll_out(model, {}, *a, config, G, **options))
        out = jax.device_get(roll(jnp.array(prompts)[:, None], starts, jax.random.key(0), jnp.array(numbers)))
        jax.effects_barrier()
        return out

    early = run([5, 7], [0, 1])
    assert model.calls == 3, "a prompt and two steps"
    np.testing.assert_array_equal(early.ids[:, 0, :4], [[6, 7, 8, 8], [8, 8, 8, 8]])
    np.testing.assert_array_equal(early.mask.sum(-1), [[3, 3], [1, 1]])
    full = run([5, 0, 7], [0, 2, 1])
    assert model.calls == 3 + 40 and full.truncated[1].all()
    for name, want in early._asdict().items():
        np.testing.assert_array_equal(getattr(full, name)[[0, 2]], want, err_msg=name)


def test_filtered_rollouts_tell_both_log_probabilities():
    logits = np.array([1.0, 3.0, 2.0, 0.0, 2.5])
    with pytest.warns(RLWarning):
        config = RolloutConfig(1, 6, temperature=0.5, top_k=2, min_p=0.1, min_new_tokens=2)
        config.validate()
    arguments = (jnp.zeros((40, 1), jnp.int32), jnp.zeros(40, jnp.int32), jax.random.key(0), jnp.arange(40))
    run = jax.jit(lambda *a: roll_out(Scripted(logits), {}, *a, config, G, stop_ids=(4,), pad_id=3))
    drawn = jax.device_get(run(*arguments))
    assert set(drawn.ids[..., :2].ravel()) == {1, 2}, "the stop token not yet, and 3 is padding"
    assert set(drawn.ids[..., 2][drawn.mask[..., 2]]) == {1, 4}, "then it is one of the two likeliest"
    log_p = 2 * logits - np.log(np.exp(2 * logits).sum())
    np.testing.assert_allclose(drawn.logp, np.where(drawn.mask, log_p[drawn.ids], 0), rtol=1e-5)
    kept = 2 * logits - np.log(np.exp(2 * logits[[1, 4]]).sum())
    later = drawn.mask & (np.arange(6) >= 2)
    np.testing.assert_allclose(drawn.filtered_logp[later], kept[drawn.ids[later]], rtol=1e-4, atol=1e-6)


# --- devices -----------------------------------------------------------------------------------------------

MESHES = [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, sequence=2, tensor=2)]


@functools.cache
def on_one_device(layers: str):
    return jax.device_get(run_on(layers, None))


def run_on(layers: str, mesh: MeshConfig | None):
    """Rollout and scores of eight prompts, jitted with everything placed as training places it."""
    model, params = small_model(layers, 1 + layers.count("+"))
    prompts, starts = left_pad([np.arange(1, 2 + q % P) + q for q in range(8)], PAD, P)
    arguments = (jnp.asarray(prompts), jnp.asarray(starts), jnp.arange(8))

    def both(params, prompts, starts, numbers):
        drawn = roll(model, params, prompts, starts, jax.random.key(0), numbers)
        return drawn, score_tokens(model, params, prompts, starts, drawn.ids, drawn.mask, TEMPERATURE)

    if mesh is None:
        return jax.jit(both)(params, *arguments)
    mesh = make_mesh(mesh, jax.devices()[:8])
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, tree_shardings(params, mesh))
        compiled = jax.jit(both, out_shardings=rows).lower(params, *jax.device_put(arguments, rows)).compile()
        return compiled(params, *jax.device_put(arguments, rows))


def assert_mesh_changes_nothing(layers: str, mesh: MeshConfig) -> None:
    (want, scores), (drawn, sharded_scores) = on_one_device(layers), jax.device_get(run_on(layers, mesh))
    assert len(np.unique(want.lengths)) > 2
    for name in ("ids", "mask", "truncated", "lengths"):
        np.testing.assert_array_equal(getattr(drawn, name), getattr(want, name), name)
    for name in ("logp", "filtered_logp"):
        np.testing.assert_allclose(getattr(drawn, name), getattr(want, name), atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sharded_scores, scores)


def test_a_mesh_changes_nothing():
    assert_mesh_changes_nothing("forgetting", MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "layers",
    ["softmax(window=5)", "softmax + native_hybrid", "rndemb_qk + cosformer", "tropical", "softplus"],
)
def test_a_mesh_changes_nothing_for_other_layers(layers, mesh):
    assert_mesh_changes_nothing(layers, mesh)


# --- texts -------------------------------------------------------------------------------------------------


def test_texts_end_before_the_stop_token():
    tokenizer = ByteTokenizer()
    texts = [["4", "42, sir"], ["", "not fini"]]
    ids = np.full((2, 2, 8), tokenizer.pad_id, np.int32)
    lengths, truncated = np.zeros((2, 2), np.int32), np.array([[False, False], [False, True]])
    for place in np.ndindex(2, 2):
        row = [
            *tokenizer.encode(texts[place[0]][place[1]]),
            *([] if truncated[place] else [tokenizer.eos_id]),
        ]
        ids[place][: len(row)], lengths[place] = row, len(row)
    prompts, starts = left_pad([[tokenizer.bos_id, *b"6*7="], [tokenizer.bos_id]], tokenizer.pad_id)
    empty = np.zeros((2, 2, 8))
    rollout = Rollout(ids, empty, empty, empty, truncated, lengths)
    assert completion_texts(tokenizer, prompts, starts, rollout) == texts
