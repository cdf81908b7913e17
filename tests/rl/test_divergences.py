"""KL estimators: bounds and orders, expected gradients over a small vocabulary, correction, the KL in the reward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.rl.config import KL_NAMES, KLConfig
from attnlab.rl.divergences import KL_ESTIMATORS, divergence, reward_penalty
from tests.rl.arrays import MASK, arrays, float64, spoiled  # noqa: F401

pytestmark = pytest.mark.usefixtures("float64")
X = arrays()
D = X.ref_logp - X.logp


def estimate(name, logp=X.logp, ref_logp=X.ref_logp, ratio=None, **options):
    return np.asarray(divergence(KLConfig(beta=1, estimator=name, **options), logp, ref_logp, MASK, ratio))


def test_every_estimator_equals_its_equation():
    want = {"k1": -D, "k2": D**2 / 2, "k3": np.exp(D) - D - 1, "abs": np.abs(D), "k3_plus": np.exp(D) - D - 1}
    assert tuple(KL_ESTIMATORS) == KL_NAMES and want.keys() == KL_ESTIMATORS.keys()
    for name, each in want.items():
        np.testing.assert_allclose(estimate(name), np.where(MASK, each, 0), rtol=1e-10, err_msg=name)


def test_k3_is_positive_but_for_equal_policies_and_near_k2():
    assert (estimate("k3")[MASK] > 0).all() and not estimate("k3", ref_logp=X.logp).any()
    errors = [
        np.abs(estimate("k3", X.logp, X.logp + h) - estimate("k2", X.logp, X.logp + h)).max()
        for h in (0.1, 0.05)
    ]
    assert 7 < errors[0] / errors[1] < 9  # third order
    far = estimate("k3", X.logp, X.logp + 1e4)
    np.testing.assert_allclose(far, np.where(MASK, np.exp(20) - 21, 0))


def expected_gradient(name, theta, ref):
    """Sum over the vocabulary of p_v times the estimator's gradient: what sampling gives on average."""
    p = jax.nn.softmax(theta)

    def mean(theta):
        kl = KL_ESTIMATORS[name](ref - jax.nn.log_softmax(theta))
        return (p * kl).sum()

    return jax.jit(jax.grad(mean))(theta)


def test_expected_gradients_over_a_small_vocabulary():
    rng = np.random.default_rng(3)
    theta, ref = jnp.asarray(rng.standard_normal(6)), jax.nn.log_softmax(rng.standard_normal(6))

    def reverse(theta):
        logp = jax.nn.log_softmax(theta)
        return (jnp.exp(logp) * (logp - ref)).sum()

    def forward(theta):
        return (jnp.exp(ref) * (ref - jax.nn.log_softmax(theta))).sum()

    np.testing.assert_allclose(expected_gradient("k1", theta, ref), 0, atol=1e-15)
    for name, exact in (("k2", reverse), ("k3_plus", reverse), ("k3", forward)):
        np.testing.assert_allclose(
            expected_gradient(name, theta, ref), jax.jit(jax.grad(exact))(theta), rtol=1e-10
        )


def test_correction_multiplies_by_the_ratio_and_its_gradient_flows():
    ratio = np.exp(X.logp - X.old_logp)
    np.testing.assert_allclose(
        estimate("k3", ratio=ratio, is_correct=True), estimate("k3") * ratio, rtol=1e-12
    )
    config = KLConfig(beta=1, is_correct=True)
    g = jax.grad(lambda ratio: divergence(config, X.logp, X.ref_logp, MASK, ratio).sum())(jnp.asarray(ratio))
    np.testing.assert_allclose(g, estimate("k3"), rtol=1e-12)
    with pytest.raises(ValueError, match="ratio=None"):
        estimate("k3", is_correct=True)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_what_is_not_scored_changes_nothing_and_the_reference_is_constant(name):
    total = jax.jit(
        jax.value_and_grad(
            lambda a, b: divergence(KLConfig(beta=1, estimator=name), a, b, MASK).sum(), (0, 1)
        )
    )
    clean = total(X.logp, X.ref_logp)
    dirty = total(spoiled(X.logp, np.nan), spoiled(X.ref_logp, np.inf))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)
    assert clean[1][0].any() and not clean[1][0][~MASK].any() and not clean[1][1].any()


def test_penalty_of_the_reward():
    config = KLConfig(beta=0.3, in_reward=True)
    got = reward_penalty(config, spoiled(X.old_logp, np.nan), spoiled(X.ref_logp, np.inf), MASK)
    np.testing.assert_allclose(got, 0.3 * np.where(MASK, X.old_logp - X.ref_logp, 0).sum(-1), rtol=1e-12)
