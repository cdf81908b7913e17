"""Advantages: equations in loops, what they are invariant to, rewards that do not apply, rows that are not there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.rl.advantages import ADVANTAGES, add_entropy, advantages, step_advantages
from attnlab.rl.config import ADVANTAGE_NAMES, AdvantageConfig
from tests.rl.arrays import G, N, Q, arrays, float64  # noqa: F401

pytestmark = pytest.mark.usefixtures("float64")
RNG = np.random.default_rng(0)
REWARDS = RNG.standard_normal((Q, G, 2))
WEIGHTS = np.array([1.0, 0.5])
BARE = AdvantageConfig(eps=0.0)


def named(name, **options):
    return dataclasses.replace(BARE, name=name, **options)


jitted = jax.jit(advantages, static_argnums=0)


def compute(config, rewards, weights=WEIGHTS, **rest):
    return jitted(config, rewards, weights, **rest)


def loops(name, rewards, weights, eps):
    """The table of the specification, a number at a time."""
    r = (rewards * weights).sum(-1)
    if name == "per_reward":
        r = sum(w * np.stack([(g - g.mean()) / (g.std(ddof=1) + eps) for g in rewards[..., k]])
                for k, w in enumerate(weights))  # fmt: skip
        return (r - r.mean()) / (r.std(ddof=1) + eps)
    A = np.zeros_like(r)
    for q in range(Q):
        for i in range(G):
            others = [r[q, j] for j in range(G) if j != i]
            mean = np.mean(others) if name == "rloo" else r[q].mean()
            by = {"group": r[q].std(ddof=1) + eps, "batch": r.std(ddof=1) + eps}.get(name, 1.0)
            A[q, i] = (r[q, i] - mean) / by
    return A


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_rule_equals_its_equation(name):
    A, info = compute(named(name, eps=0.1), REWARDS)
    np.testing.assert_allclose(A, loops(name, REWARDS, WEIGHTS, 0.1), rtol=1e-12)
    np.testing.assert_allclose(A.mean(1), 0, atol=1e-12)  # every rule is centred in its groups
    r = REWARDS @ WEIGHTS
    np.testing.assert_allclose(info.reward, r)
    np.testing.assert_allclose(info.mean, r.mean(1))
    np.testing.assert_allclose(info.std, r.std(1, ddof=1))
    assert info.groups.all() and not info.zero_std.any() and info.scorable.all()


def test_the_registry_is_what_the_configuration_names():
    assert tuple(ADVANTAGES) == ADVANTAGE_NAMES


@pytest.mark.parametrize("name", ["group", "batch", "per_reward"])
def test_scale_and_shift_of_rewards_do_not_matter(name):
    A, _ = compute(named(name), REWARDS)
    moved, _ = compute(named(name), 3.7 * REWARDS + 11.0)
    np.testing.assert_allclose(moved, A, rtol=1e-10)


def test_standard_deviation_of_a_group_is_one_with_its_ddof():
    for ddof in (0, 1):
        A, _ = compute(named("group", ddof=ddof), REWARDS)
        np.testing.assert_allclose(A.std(1, ddof=ddof), 1, rtol=1e-12)


def test_leave_one_out_is_the_centred_reward_times_a_constant():
    rloo, none = compute(named("rloo"), REWARDS)[0], compute(named("none"), REWARDS)[0]
    np.testing.assert_allclose(rloo, none * G / (G - 1), rtol=1e-12)


@pytest.mark.parametrize("name", ["group", "none", "rloo"])
def test_groups_do_not_see_each_other_and_have_no_order(name):
    A, _ = compute(named(name), REWARDS)
    order = np.array([3, 0, 4, 1, 2])
    changed = REWARDS[:, order].copy()
    changed[1] = 100 * RNG.standard_normal((G, 2))
    B, _ = compute(named(name), changed)
    np.testing.assert_allclose(B[::2], A[::2][:, order], rtol=1e-12)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_rows_that_do_not_count_change_nothing(name):
    """Unscorable rows, and padding, as if they were not there."""
    A, _ = compute(named(name, eps=1e-4), REWARDS)
    more = np.concatenate([REWARDS, np.full((Q, 2, 2), np.nan)], 1)
    more[:, -1] = 1e6
    rows = np.ones((Q + 1, G + 2), bool)
    rows[:, -1], rows[-1] = False, False
    more = np.concatenate([more, RNG.standard_normal((1, G + 2, 2))])
    B, info = compute(named(name, eps=1e-4), more, rows=rows)
    np.testing.assert_allclose(B[:Q, :G], A, rtol=1e-12)
    assert not B[:, G:].any() and not B[Q:].any()
    assert np.isnan(info.reward[:, G:]).all() and not info.groups[Q] and not info.zero_std[Q]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_whose_rewards_are_alike_teaches_exactly_nothing(name):
    rewards = np.float32(REWARDS.copy())
    rewards[1] = np.float32([0.1, 1e4 / 3])  # their mean rounds
    rewards[2, 1:] = np.nan  # one scorable row alone
    A, info = compute(named(name, eps=1e-8), rewards)
    assert not A[1:].any() and A[0].all()
    np.testing.assert_array_equal(info.zero_std, [False, True, True])


def test_a_reward_that_does_not_apply_is_passed_over():
    rewards = REWARDS.copy()
    rewards[0, 2, 1] = np.nan
    _, info = compute(BARE, rewards)
    np.testing.assert_allclose(info.reward[0, 2], rewards[0, 2, 0])
    A, _ = compute(named("per_reward"), rewards)
    z = [(c - np.nanmean(c)) / np.nanstd(c, ddof=1) for c in rewards[0].T]
    s = z[0] + 0.5 * np.where(np.isnan(z[1]), 0, z[1])
    np.testing.assert_allclose(A[0] / A[0, 0], s / s[0], rtol=1e-10)


def test_clip_penalty_and_constants():
    penalty = RNG.standard_normal((Q, G))
    A, info = compute(BARE, REWARDS, penalty=penalty)
    want = loops("group", (REWARDS @ WEIGHTS - penalty)[..., None], np.ones(1), 0.0)
    np.testing.assert_allclose(A, want, rtol=1e-12)
    np.testing.assert_allclose(info.reward, REWARDS @ WEIGHTS)
    clipped, _ = compute(named("group", clip=0.3), REWARDS)
    np.testing.assert_allclose(clipped, np.clip(loops("group", REWARDS, WEIGHTS, 0.0), -0.3, 0.3), rtol=1e-12)
    gradient = jax.jit(jax.grad(lambda r: advantages(BARE, r, WEIGHTS)[0][0, 0]))(jnp.asarray(REWARDS))
    assert not gradient.any()


def test_step_rewards_count_for_the_tokens_before_them():
    """Two completions: steps end at tokens 1, 3 and at token 2."""
    rewards = np.full((1, 2, 5), np.nan)
    rewards[0, 0, [1, 3]], rewards[0, 1, 2] = [1.0, 3.0], 8.0
    mask = np.arange(5) < np.array([[[4], [3]]])
    z = (np.array([1.0, 3.0, 8.0]) - 4) / np.std([1.0, 3.0, 8.0], ddof=1)
    A = jax.jit(lambda r: step_advantages(BARE, r, mask))(rewards)
    np.testing.assert_allclose(A[0, 0], [z[0] + z[1], z[0] + z[1], z[1], z[1], 0], rtol=1e-12)
    np.testing.assert_allclose(A[0, 1], [z[2], z[2], z[2], 0, 0], rtol=1e-12)


def test_entropy_in_the_advantage_is_capped_and_constant():
    x = arrays()
    config = named("group", entropy_bonus=0.4, entropy_bonus_cap=2.5)
    A = add_entropy(config, x.advantages, np.where(x.mask, x.entropy, np.nan), x.mask)
    bonus = np.minimum(0.4 * x.entropy, np.abs(x.advantages[..., None]) / 2.5)
    np.testing.assert_allclose(A, np.where(x.mask, x.advantages[..., None] + bonus, 0), rtol=1e-12)
    assert (np.sign(A) == np.sign(x.advantages)[..., None])[x.mask].all()
    total = lambda H: add_entropy(config, x.advantages, H, x.mask).sum()  # noqa: E731
    assert not jax.grad(total)(jnp.asarray(x.entropy)).any()
    assert A.shape == (Q, G, N)
