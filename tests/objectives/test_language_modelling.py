"""Next-token losses against numpy in float64, the z-loss, and what is counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.models.config import ModelConfig
from attnlab.models.language_model import forward_flops
from attnlab.objectives.language_modelling import LanguageModelling, LanguageModellingConfig, token_losses
from attnlab.objectives.objective import add_terms, average

MODEL = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, mlp_size=8, vocab_size=11, init_std=0.3)
RNG = np.random.default_rng(0)
BATCH = {
    "tokens": jnp.array(RNG.integers(0, 11, (3, 7)), jnp.int32),
    "targets": jnp.array(RNG.integers(0, 11, (3, 7)), jnp.int32),
    "positions": jnp.broadcast_to(jnp.arange(7), (3, 7)),
    "segments": jnp.ones((3, 7), jnp.int32),
    "weights": jnp.array(RNG.integers(0, 2, (3, 7)), jnp.float32),
    "bytes": jnp.array(RNG.integers(0, 4, (3, 7)), jnp.float32),
}


@pytest.fixture(scope="module")
def evaluated():
    objective = LanguageModelling(MODEL, LanguageModellingConfig(z_loss=0.1), 7)
    params = objective.init(jax.random.key(0))
    return objective, params, np.asarray(objective.logits(params, BATCH), np.float64)


def test_losses_equal_numpy_even_for_large_logits():
    logits = np.random.default_rng(1).standard_normal((2, 3, 5)) * 200
    targets = np.array([[0, 1, 2], [3, 4, 0]])
    shifted = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nll, lse = token_losses(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    np.testing.assert_allclose(lse, shifted, rtol=1e-5)
    np.testing.assert_allclose(
        nll, shifted - np.take_along_axis(logits, targets[..., None], -1)[..., 0], atol=1e-3
    )


def test_terms_are_sums_over_counted_targets(evaluated):
    objective, params, logits = evaluated
    terms = objective(params, BATCH, jax.random.key(0))
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - np.take_along_axis(logits, np.asarray(BATCH["targets"])[..., None], -1)[..., 0]
    w = np.asarray(BATCH["weights"])
    values = average(terms)
    np.testing.assert_allclose(terms.loss_sum, (w * (nll + 0.1 * lse**2)).sum(), rtol=1e-5)
    np.testing.assert_allclose(values["nll"], (w * nll).sum() / w.sum(), rtol=1e-5)
    bits = (w * nll).sum() / np.log(2) / (w * np.asarray(BATCH["bytes"])).sum()
    np.testing.assert_allclose(values["bits_per_byte"], bits, rtol=1e-5)
    hits = (logits.argmax(-1) == np.asarray(BATCH["targets"])) * w
    np.testing.assert_allclose(values["accuracy"], hits.sum() / w.sum(), rtol=1e-5)


def test_z_loss_enters_the_loss_and_not_the_nll(evaluated):
    objective, params, _ = evaluated
    plain = dataclasses.replace(objective, options=LanguageModellingConfig())
    with_z, without = objective(params, BATCH, jax.random.key(0)), plain(params, BATCH, jax.random.key(0))
    assert with_z.loss_sum > without.loss_sum
    np.testing.assert_allclose(with_z.metrics["nll"][0], without.loss_sum, rtol=1e-6)


def test_terms_of_halves_add_up_to_the_whole(evaluated):
    objective, params, _ = evaluated
    rng = jax.random.key(0)
    whole = objective(params, BATCH, rng)
    first, second = (
        objective(params, jax.tree.map(lambda x, s=s: x[s], BATCH), rng) for s in (slice(2), slice(2, 3))
    )
    both = add_terms(first, second)
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"tie_embeddings": True, "logit_soft_cap": 0.7},
        pytest.param({}, marks=pytest.mark.thorough),
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.thorough),
    ],
)
def test_the_gradient_is_that_of_losses_of_whole_logits(change):
    objective = LanguageModelling(
        dataclasses.replace(MODEL, **change), LanguageModellingConfig(z_loss=0.1), 7
    )
    params = objective.init(jax.random.key(1))

    def by_logits(params):
        nll, lse = token_losses(objective.logits(params, BATCH), BATCH["targets"])
        return jnp.sum((nll + 0.1 * lse**2) * BATCH["weights"])

    def fused(params):
        return objective(params, BATCH, None).loss_sum

    (got, gradient), (want, expected) = (jax.jit(jax.value_and_grad(f))(params) for f in (fused, by_logits))
    bound = (
        2e-2 if change.get("dtype") else 1e-5
    )  # of the largest: bfloat16 rounds what reaches the norm below
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=bound * float(jnp.abs(y).max()))


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_the_implementation_may_be_chosen(evaluated, implementation):
    objective, params, _ = evaluated
    options = LanguageModellingConfig(z_loss=0.1, implementation=implementation)
    named = dataclasses.replace(objective, options=options)(params, BATCH, None)
    for a, b in zip(jax.tree.leaves(named), jax.tree.leaves(objective(params, BATCH, None)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.thorough
def test_training_holds_no_logits():
    """Compiled, value and gradient take less memory than a quarter of the logits [1, 2048, 8192]."""
    model = dataclasses.replace(MODEL, vocab_size=8192)
    objective = LanguageModelling(model, LanguageModellingConfig(), 2048)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    batch = {name: jax.ShapeDtypeStruct((1, 2048), x.dtype) for name, x in BATCH.items()}

    def loss(params, batch):
        return objective(params, batch, None).loss_sum

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 8192 * 4 // 4


def test_uncounted_targets_do_not_matter(evaluated):
    objective, params, _ = evaluated
    counted = BATCH["weights"] > 0
    changed = jnp.where(counted, BATCH["targets"], (BATCH["targets"] + 1) % 11)
    assert (changed != BATCH["targets"]).any()
    same, other = (objective(params, BATCH | {"targets": t}, None) for t in (BATCH["targets"], changed))
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_cost_is_the_models(evaluated):
    assert evaluated[0].forward_flops_per_token() == forward_flops(MODEL, 7)


def test_negative_z_loss_is_refused():
    with pytest.raises(ValueError, match="z_loss=-1.0 is negative"):
        LanguageModellingConfig(z_loss=-1.0).validate()


def test_an_unknown_implementation_is_refused():
    with pytest.raises(
        ValueError, match="objective.implementation='abacus' is unknown; choose one of pallas_tpu"
    ):
        LanguageModellingConfig(implementation="abacus").validate()
