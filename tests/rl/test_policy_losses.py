"""Policy losses: their common gradient on-policy, the clip's half-regions, the cap, GSPO's two forms, masking."""

from functools import partial

import jax
import numpy as np
import pytest

from attnlab.rl.config import LOSS_NAMES, PolicyLossConfig
from attnlab.rl.policy_losses import POLICY_LOSSES, clip_statistics, policy_loss, policy_ratio
from tests.rl.arrays import LENGTHS, MASK, G, N, Q, arrays, float64, spoiled  # noqa: F401

pytestmark = pytest.mark.usefixtures("float64")
X = arrays()
A3 = np.broadcast_to(X.advantages[..., None], MASK.shape)
RHO = np.exp(X.logp - X.old_logp)


@partial(jax.jit, static_argnums=0)
def jitted(config, logp, old_logp, A, L, mask):
    def total(logp):
        loss = policy_loss(config, logp, old_logp, A, mask)
        return (L * loss).sum(), loss

    (_, loss), g = jax.value_and_grad(total, has_aux=True)(logp)
    return loss, g


jitted_statistics = jax.jit(clip_statistics, static_argnums=0)


def gradient(config, logp=X.logp, old_logp=X.old_logp, A=X.advantages, L=1.0, mask=MASK):
    """Per-token losses, and the gradient of their sum times L."""
    L = np.broadcast_to(L, mask.shape)
    return tuple(np.asarray(x) for x in jitted(config, logp, old_logp, A, L, mask))


@pytest.mark.smoke
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_all_losses_have_the_gradient_of_reinforce(name):
    config = PolicyLossConfig(name=name, eps_low=0.1, eps_high=0.3, cispo_min=0.5, cispo_max=1.5)
    loss, g = gradient(config, old_logp=X.logp, L=1 / LENGTHS[..., None])
    want = np.where(MASK, -A3 / LENGTHS[..., None], 0)
    np.testing.assert_allclose(g, want, rtol=1e-12)
    value = -A3 * X.logp if name in ("cispo", "reinforce") else -A3
    np.testing.assert_allclose(loss, np.where(MASK, value, 0), rtol=1e-12)


def test_clip_equals_numpy_and_stops_the_gradient_in_its_half_regions():
    config = PolicyLossConfig(eps_low=0.15, eps_high=0.28)
    loss, g = gradient(config)
    want = -np.minimum(RHO * A3, np.clip(RHO, 0.85, 1.28) * A3)
    np.testing.assert_allclose(loss, np.where(MASK, want, 0), rtol=1e-12)
    low, high = MASK & (A3 < 0) & (RHO < 0.85), MASK & (A3 > 0) & (RHO > 1.28)
    assert low.any() and high.any() and not g[low | high].any()
    rest = MASK & ~low & ~high
    np.testing.assert_allclose(g[rest], (-A3 * RHO)[rest], rtol=1e-12)
    said = jitted_statistics(config, X.logp, X.old_logp, X.advantages, MASK)
    np.testing.assert_array_equal(said.low, low)
    np.testing.assert_array_equal(said.high, high)
    np.testing.assert_array_equal(said.region, low | high)
    assert not said.capped.any()


def test_without_bounds_the_loss_is_the_ratio_times_the_advantage():
    loss, g = gradient(PolicyLossConfig(eps_low=np.inf, eps_high=np.inf))
    for got in (loss, g):
        np.testing.assert_allclose(got, np.where(MASK, -RHO * A3, 0), rtol=1e-12)


def test_ratio_cap_bounds_the_loss_where_the_advantage_is_negative():
    old_logp = X.old_logp - 1.0  # large ratios
    config = PolicyLossConfig(ratio_cap=1.5)
    rho = np.exp(X.logp - old_logp)
    loss, g = gradient(config, old_logp=old_logp)
    capped = MASK & (A3 < 0) & (rho > 1.5)
    np.testing.assert_allclose(loss[capped], -1.5 * A3[capped], rtol=1e-12)
    assert capped.any() and not g[capped].any()
    plain, _ = gradient(PolicyLossConfig(), old_logp=old_logp)
    np.testing.assert_array_equal(loss[~capped], plain[~capped])
    dual = np.where(A3 < 0, np.minimum(plain, -1.5 * A3), plain)  # the other published form
    np.testing.assert_allclose(loss, dual, rtol=1e-12)
    np.testing.assert_array_equal(
        jitted_statistics(config, X.logp, old_logp, X.advantages, MASK).capped, capped
    )


def test_gspo_of_a_row_and_of_its_tokens_agree():
    config = PolicyLossConfig(name="gspo", eps_low=0.05, eps_high=0.08)
    s = np.exp(np.where(MASK, X.logp - X.old_logp, 0).sum(-1) / LENGTHS)
    of_rows = gradient(config, L=1 / LENGTHS[..., None])
    of_tokens = gradient(config, A=A3, L=1 / LENGTHS[..., None])
    want = -np.minimum(s * X.advantages, np.clip(s, 0.95, 1.08) * X.advantages)
    for loss, g in (of_rows, of_tokens):
        np.testing.assert_allclose(loss, np.where(MASK, want[..., None], 0), rtol=1e-12)
        np.testing.assert_allclose(g, of_rows[1], rtol=1e-10, atol=1e-14)
    said = jitted_statistics(config, X.logp, X.old_logp, X.advantages, MASK)
    region = (X.advantages > 0) & (s > 1.08) | (X.advantages < 0) & (s < 0.95)
    np.testing.assert_array_equal(said.region, region[..., None] & MASK)
    assert said.low.any() and said.high.any() and not of_rows[1][region].any()


def test_gspo_keeps_a_tokens_gradient_with_its_own_advantage():
    config = PolicyLossConfig(name="gspo", eps_low=np.inf, eps_high=np.inf)
    A = np.where(np.arange(N) == 1, 2.0, 0.0) * np.ones((Q, G, 1))
    _, g = gradient(config, A=A)
    assert g[0, 0, 1] and not np.delete(g, 1, -1).any()
    ratio = policy_ratio(config, X.logp, X.old_logp, MASK)
    np.testing.assert_allclose(g[0, 0, 1], -2 * ratio[0, 0, 0], rtol=1e-12)


def test_cispo_keeps_every_gradient_at_a_bounded_constant_ratio():
    config = PolicyLossConfig(name="cispo", cispo_min=0.9, cispo_max=1.2)
    bounded = np.clip(RHO, 0.9, 1.2)
    loss, g = gradient(config)
    np.testing.assert_allclose(g, np.where(MASK, -bounded * A3, 0), rtol=1e-12)
    np.testing.assert_allclose(loss, np.where(MASK, -bounded * A3 * X.logp, 0), rtol=1e-12)
    said = jitted_statistics(config, X.logp, X.old_logp, X.advantages, MASK)
    np.testing.assert_array_equal(said.low, MASK & (RHO < 0.9))
    np.testing.assert_array_equal(said.region, MASK & (bounded != RHO))


@pytest.mark.parametrize("by", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_what_is_not_scored_changes_nothing(name, by):
    config, mask = PolicyLossConfig(name=name), MASK & (np.arange(G) != 2)[:, None]
    clean = gradient(config, mask=mask)
    dirty = gradient(config, spoiled(X.logp, by, mask), spoiled(X.old_logp, by, mask), mask=mask)
    np.testing.assert_array_equal(dirty, clean)
    assert not clean[0][~mask].any() and not clean[1][~mask].any()
    said = jitted_statistics(config, spoiled(X.logp, by, mask), spoiled(X.old_logp, -by, mask), A3, mask)
    assert not np.stack(said)[:, ~mask].any()


def test_log_ratios_are_clamped():
    loss, g = gradient(PolicyLossConfig(eps_high=np.inf), old_logp=X.logp - 500)
    np.testing.assert_allclose(loss, np.where(MASK, -np.exp(20.0) * A3, 0), rtol=1e-12)
    assert not g.any()


def test_registry_and_shapes():
    assert tuple(POLICY_LOSSES) == LOSS_NAMES
    with pytest.raises(ValueError, match="advantages"):
        policy_loss(PolicyLossConfig(), X.logp, X.old_logp, X.advantages[:, :2], MASK)
