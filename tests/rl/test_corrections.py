"""Corrections for rollouts of another engine, rows that have become off-policy, and tokens of high entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.rl.config import CORRECTION_NAMES, CorrectionConfig
from attnlab.rl.corrections import correction, entropy_threshold, on_policy_rows, top_tokens
from tests.rl.arrays import LENGTHS, MASK, N, arrays, float64, spoiled  # noqa: F401

pytestmark = pytest.mark.usefixtures("float64")
X = arrays(apart=0.8)
D = X.old_logp - X.logp  # X.logp as the behaviour's


@pytest.mark.parametrize("name", CORRECTION_NAMES)
def test_every_correction_equals_its_equation(name):
    c = np.exp(D)
    if name.startswith("sequence"):
        c = np.broadcast_to(np.exp(np.where(MASK, D, 0).sum(-1, keepdims=True)), MASK.shape)
    want = {
        "none": np.ones_like(c),
        "token_truncate": np.minimum(c, 2),
        "sequence_truncate": np.minimum(c, 2),
    }
    want = want.get(name, np.where((c >= 0.6) & (c <= 2), c, 0))
    assert (want[MASK] != c[MASK]).any()
    config = CorrectionConfig(name=name, least=0.6)
    run = jax.jit(lambda old: correction(config, old, spoiled(X.logp, np.inf), MASK))
    got = run(spoiled(X.old_logp, np.nan))
    np.testing.assert_allclose(got, np.where(MASK, want, 0), rtol=1e-12)
    g = jax.grad(lambda old: run(old).sum())(jnp.asarray(X.old_logp))
    assert not g.any()


def test_rows_that_the_policy_has_left_are_dropped_if_they_are_bad():
    moved = np.where(MASK, D, 0).sum(-1) / LENGTHS  # behaviour old_logp, policy logp
    config = CorrectionConfig(off_policy_threshold=0.1)
    for A in (X.advantages, X.advantages[..., None] * np.ones(N)):
        keep = on_policy_rows(config, X.logp, spoiled(X.old_logp, np.nan), A, MASK)
        np.testing.assert_array_equal(keep, ~((X.advantages < 0) & (moved > 0.1)))
    assert keep.any() and not keep.all() and ((moved > 0.1) & keep).any()
    assert on_policy_rows(CorrectionConfig(), X.logp, X.old_logp, X.advantages, MASK).all()


@pytest.mark.parametrize("q", [0.2, 0.25, 0.9])
def test_threshold_is_the_quantile_of_the_scored_tokens(q):
    H, config = X.entropy[MASK], CorrectionConfig(top_entropy=q)
    dirty = spoiled(X.entropy, np.nan)
    threshold = jax.jit(lambda H, mask: entropy_threshold(config, H, mask))(dirty, MASK)
    np.testing.assert_allclose(threshold, np.quantile(H, 1 - q), rtol=1e-12)
    chosen = top_tokens(dirty, MASK, threshold)
    np.testing.assert_array_equal(chosen, MASK & (X.entropy >= np.quantile(H, 1 - q)))
    assert abs(chosen.sum() - q * H.size) <= 1


def test_threshold_where_there_is_little_to_choose_from():
    H, one = jnp.asarray(X.entropy), np.zeros_like(MASK)
    config = CorrectionConfig(top_entropy=0.2)
    assert not top_tokens(H, one, entropy_threshold(config, H, one)).any()
    one[0, 1, 0] = True
    np.testing.assert_array_equal(top_tokens(H, one, entropy_threshold(config, H, one)), one)
    everything = entropy_threshold(CorrectionConfig(), H, MASK)
    np.testing.assert_array_equal(top_tokens(H, MASK, everything), MASK)
    equal = jnp.ones_like(H)
    np.testing.assert_array_equal(top_tokens(equal, MASK, entropy_threshold(config, equal, MASK)), MASK)
