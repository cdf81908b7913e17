"""The whole loss: order of multiplications, aggregation whatever the split, weights as in plain GRPO, entropy bonus."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab.rl.aggregation import AGGREGATIONS, aggregate, divide
from attnlab.rl.config import (
    AGGREGATION_NAMES,
    EntropyBonusConfig,
    GRPOConfig,
    KLConfig,
    PolicyLossConfig,
    RolloutConfig,
    SequenceWeightConfig,
)
from attnlab.rl.policy_losses import policy_loss
from attnlab.rl.sequence_weights import sequence_weights
from attnlab.rl.surrogate import applied_coefficient, items_per_token, loss_terms, next_coefficient, surrogate
from tests.rl.arrays import LENGTHS, MASK, G, N, Q, arrays, float64, spoiled  # noqa: F401

pytestmark = pytest.mark.usefixtures("float64")
X = arrays()
PLAIN = GRPOConfig(rollout=RolloutConfig(max_new_tokens=N))
FULL = dataclasses.replace(
    PLAIN,
    kl=KLConfig(beta=0.04),
    weights=SequenceWeightConfig("egsw", stop_gradient=False, entropy_source="current"),
)
HOLES = MASK & (np.arange(Q) != 1)[:, None, None]


def terms(config, logp, entropy, x=X, mask=MASK, coefficient=0.01, **rest):
    """(sum, weight) of everything there is."""
    w = sequence_weights(config.weights, x.advantages, entropy, mask)
    found = surrogate(config, logp, x.old_logp, x.advantages, mask, ref_logp=x.ref_logp, weights=w)
    return loss_terms(config, found.total, mask, entropy=entropy, coefficient=coefficient, **rest)


def test_parts_are_multiplied_in_the_published_order():
    rng = np.random.default_rng(2)
    w, f = rng.gamma(2.0, 1.0, (Q, G)), rng.gamma(2.0, 1.0, (Q, G, N))
    got = surrogate(FULL, X.logp, X.old_logp, X.advantages, MASK, ref_logp=X.ref_logp, weights=w, factors=f)
    l = policy_loss(FULL.policy_loss, X.logp, X.old_logp, X.advantages, MASK)
    d = np.where(MASK, X.ref_logp - X.logp, 0)
    kl = np.exp(d) - d - 1
    np.testing.assert_allclose(got.policy, w[..., None] * f * l, rtol=1e-12)
    np.testing.assert_allclose(got.kl, kl, rtol=1e-9)
    np.testing.assert_allclose(got.total, w[..., None] * f * l + 0.04 * kl, rtol=1e-10)
    weighted = dataclasses.replace(FULL, weights=dataclasses.replace(FULL.weights, weight_kl=True))
    got = surrogate(
        weighted, X.logp, X.old_logp, X.advantages, MASK, ref_logp=X.ref_logp, weights=w, factors=f
    )
    np.testing.assert_allclose(got.total, w[..., None] * (f * l + 0.04 * kl), rtol=1e-10)
    rewarded = dataclasses.replace(FULL, kl=KLConfig(beta=0.04, in_reward=True))
    got = surrogate(rewarded, X.logp, X.old_logp, X.advantages, MASK, ref_logp=X.ref_logp)
    np.testing.assert_array_equal(got.total, l)
    assert got.kl.any()
    with pytest.raises(ValueError, match=r"beta=0\.04"):
        surrogate(FULL, X.logp, X.old_logp, X.advantages, MASK)


def loops(name, loss, mask, every_row):
    total, rows = [], 0
    for l, m in zip(loss.reshape(-1, N), mask.reshape(-1, N), strict=True):
        rows += bool(m.any() or every_row)
        total.append(l[m].sum() / (max(m.sum(), 1) if name == "seq_mean_token_mean" else 1))
    by = {"token_mean": mask.sum(), "seq_sum_const": rows * N}.get(name, rows)
    return sum(total) / by


@pytest.mark.parametrize("every_row", [False, True], ids=["scored rows", "all rows"])
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_every_aggregation_equals_its_equation(name, every_row):
    config = dataclasses.replace(PLAIN, aggregation=name, count_empty_rows=every_row)
    got = divide(*aggregate(config, spoiled(X.logp, np.nan, HOLES), HOLES))
    np.testing.assert_allclose(got, loops(name, X.logp, HOLES, every_row), rtol=1e-12)
    rows = np.broadcast_to((np.arange(Q) != 1)[:, None], (Q, G))  # what is padding never counts
    got = divide(*aggregate(config, X.logp, HOLES, rows=rows))
    np.testing.assert_allclose(got, loops(name, X.logp, HOLES, False), rtol=1e-12)
    assert divide(*aggregate(config, X.logp, np.zeros_like(MASK), rows=np.zeros((Q, G), bool))) == 0
    assert tuple(AGGREGATIONS) == AGGREGATION_NAMES


def test_constant_of_dr_grpo_can_be_given():
    config = dataclasses.replace(PLAIN, aggregation="seq_sum_const", loss_length=3 * N)
    np.testing.assert_allclose(
        divide(*aggregate(config, X.logp, MASK)) * 3, loops(config.aggregation, X.logp, MASK, 0)
    )


THOROUGH = [pytest.param(n, marks=pytest.mark.thorough) for n in ("seq_sum_const", "seq_mean_token_sum")]


@pytest.mark.parametrize("name", ["seq_mean_token_mean", "token_mean", *THOROUGH])
def test_split_into_micro_batches_changes_nothing(name):
    """Value and gradient, KL, weights and bonus included, for whole groups in any number of parts."""
    config = dataclasses.replace(FULL, aggregation=name)

    def whole(logp, H):
        return divide(*terms(config, logp, H))

    def split(logp, H):
        items, parts = items_per_token(config, MASK), []
        for q in np.split(np.arange(Q), Q):
            x = type(X)(**{n: a[q] for n, a in vars(X).items()})
            parts.append(terms(config, logp[q], H[q], x, MASK[q], per_token_items=items))
        return divide(*(sum(each) for each in zip(*parts, strict=True)))

    a, b = (jax.jit(jax.value_and_grad(f, (0, 1)))(X.logp, X.entropy) for f in (whole, split))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15), a, b)
    assert np.all(a[1][1][MASK])


def test_groups_may_lie_on_eight_devices():
    config = dataclasses.replace(FULL, aggregation="token_mean")
    eight = type(X)(
        **{n: np.concatenate([a, a[:2], a[::-1]]) * (1 if n == "mask" else 0.9) for n, a in vars(X).items()}
    )
    eight.mask = eight.mask.astype(bool)

    def loss(logp, H, rest):
        return divide(*terms(config, logp, H, type(X)(**rest), rest["mask"]))

    rest = vars(eight)
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    one = gradient(rest["logp"], rest["entropy"], rest)
    placed = jax.device_put(rest, NamedSharding(Mesh(jax.devices()[:8], "d"), PartitionSpec("d")))
    many = gradient(placed["logp"], placed["entropy"], placed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15), one, many)


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo", "reinforce"])
def test_on_policy_loss_and_gradient(loss):
    """The loss is the mean advantage, 0, its gradient REINFORCE's; a KL to an equal reference adds 0."""
    A = X.advantages - X.advantages.mean(1, keepdims=True)
    config = dataclasses.replace(PLAIN, policy_loss=PolicyLossConfig(name=loss), kl=KLConfig(beta=0.1))

    def total(logp):
        found = surrogate(config, logp, None, A, MASK, ref_logp=X.logp)
        return divide(*loss_terms(config, found.total, MASK))

    value, g = jax.jit(jax.value_and_grad(total))(X.logp)
    np.testing.assert_allclose(g, np.where(MASK, -(A / LENGTHS)[..., None] / (Q * G), 0), rtol=1e-12)
    if loss in ("clip", "gspo"):
        assert abs(value) < 1e-15


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["trajectory", "step"])
def test_infinite_temperature_is_grpo(mode):
    def gradient(weights):
        config = dataclasses.replace(FULL, weights=weights)
        return jax.jit(jax.value_and_grad(lambda x: divide(*terms(config, x, X.entropy, mask=HOLES))))(X.logp)

    plain = gradient(SequenceWeightConfig())
    for P in (math.inf, 1e9):
        egsw = gradient(SequenceWeightConfig("egsw", mode, temperature=P))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8), egsw, plain)


def test_on_policy_egsw_is_negative_without_entropy():
    A = X.advantages - X.advantages.mean(1, keepdims=True)
    config = dataclasses.replace(PLAIN, weights=SequenceWeightConfig("egsw", alpha=0.0))
    w = sequence_weights(config.weights, A, X.entropy, MASK)
    found = surrogate(config, X.logp, None, A, MASK, weights=w)
    loss = divide(*loss_terms(config, found.total, MASK))
    np.testing.assert_allclose(loss, -(w * A).sum(1).mean() / G, rtol=1e-12)
    assert loss < -0.1


@pytest.mark.parametrize("by", [np.nan, np.inf])
def test_what_is_not_scored_changes_neither_value_nor_gradient(by):
    config = dataclasses.replace(FULL, kl=KLConfig(beta=0.1, is_correct=True))

    def gradient(fill):
        x = type(X)(
            **{n: spoiled(a, fill, HOLES) if a.ndim == 3 and n != "mask" else a for n, a in vars(X).items()}
        )
        f = jax.jit(jax.value_and_grad(lambda a, b: divide(*terms(config, a, b, x, HOLES)), (0, 1)))
        return f(x.logp, x.entropy)

    clean, dirty = gradient(0.0), gradient(by)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert all(g[HOLES].all() and not g[~HOLES].any() for g in clean[1])


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_bonus_is_a_token_mean_whatever_the_aggregation(name):
    config = dataclasses.replace(PLAIN, aggregation=name)
    loss = divide(*loss_terms(config, jnp.zeros((Q, G, N)), HOLES, entropy=X.entropy, coefficient=0.3))
    np.testing.assert_allclose(loss, -0.3 * X.entropy[HOLES].mean(), rtol=1e-12)


def test_adaptive_coefficient():
    config = EntropyBonusConfig(coefficient=0.1, adaptive=True, target=0.5, delta=0.2, most=0.25)
    np.testing.assert_allclose(next_coefficient(config, 0.1, 0.4), 0.25)
    np.testing.assert_allclose(next_coefficient(config, 0.25, 0.6), 0.05)
    np.testing.assert_allclose(next_coefficient(config, 0.1, 0.6), 0)
    assert applied_coefficient(config, 0.1, 0.5) == 0.1 and applied_coefficient(config, 0.1, 0.6) == 0
    fixed = EntropyBonusConfig(coefficient=0.1, target=0.5)
    assert next_coefficient(fixed, 0.1, 0.4) == 0.1 and applied_coefficient(fixed, 0.1, 0.6) == 0.1
