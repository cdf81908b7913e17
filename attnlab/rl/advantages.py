"""Rewards to advantages: how much better a completion is than the others of its group. Constants, never differentiated.

Letters: Q prompts, G completions of each (a group), K reward functions, N completion length; i a row of group g.

    r_i = sum_k weight_k reward_ik                         a NaN does not apply and is passed over; all NaN: unscorable
    group        A_i = (r_i - mean_g) / (std_g + eps)                        GRPO, 2402.03300 (ddof 1, as all codes do)
    batch        A_i = (r_i - mean_g) / (std_all + eps)                      Lite-PPO
    none         A_i = r_i - mean_g                                          Dr.GRPO, 2503.20783
    rloo         A_i = r_i - mean of the group's others                      RLOO, 2402.14740
    per_reward   s_i = sum_k weight_k (reward_ik - mean_gk) / (std_gk + eps),  A = s normalised over the batch     GDPO

Unscorable and padding rows take no part in any mean and have advantage 0; so has a row alone, and a group whose rewards
are all alike. "The batch" is whatever array is given: give the whole global batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.rl.config import AdvantageConfig
from attnlab.rl.masked import per_token, wide, zeroed
from kernels.signatures import Array, Bool, Float, checked

ZERO_STD = 1e-6  # a standard deviation up to this is rounding


class Moments(NamedTuple):
    """count, mean, std (0 with no more than ddof entries) with reduced axes kept; deviation from the mean, else 0."""

    count: Array
    mean: Array
    std: Array
    deviation: Array


class AdvantageInfo(NamedTuple):
    """What the rewards were.

    reward [Q, G]: sum over reward functions, NaN where unscorable or padding; scorable bool [Q, G].
    mean, std [Q]: of `reward` within the group. groups bool [Q]: has a scorable row.
    zero_std bool [Q]: such a group without differences to learn from.
    """

    reward: Array
    scorable: Array
    mean: Array
    std: Array
    groups: Array
    zero_std: Array


class _Scores(NamedTuple):
    """What a rule sees: rewards [Q, G, K], weights [K]; penalty, reward (without it) and scorable [Q, G]."""

    rewards: Array
    weights: Array
    penalty: Array
    reward: Array
    scorable: Array


def moments(x: Array, valid: Array, axis, ddof: int) -> Moments:
    """Of the valid entries of x. Taken from their maximum, so that equal entries deviate by exactly 0 in any dtype."""
    count = valid.sum(axis, keepdims=True)
    top = jnp.where(count > 0, jnp.where(valid, x, -jnp.inf).max(axis, keepdims=True), 0)
    x = jnp.where(valid, x - top, 0)
    mean = x.sum(axis, keepdims=True) / jnp.maximum(count, 1)
    deviation = jnp.where(valid, x - mean, 0)
    std = jnp.sqrt(jnp.square(deviation).sum(axis, keepdims=True) / jnp.maximum(count - ddof, 1))
    return Moments(count, mean + top, std, deviation)


def group_moments(reward: Array, valid: Array, ddof: int = 1) -> Moments:
    """Of [Q, G] within each group; all but the deviation are [Q, 1]."""
    return moments(reward, valid, 1, ddof)


def varies(std: Array) -> Array:
    """Whether a standard deviation is more than rounding."""
    return std > ZERO_STD


def _normalised(found: Moments, eps: float, std: Array | None = None) -> Array:
    """Deviations over std + eps; exactly 0 where entries are all alike."""
    by = found.std if std is None else std
    return jnp.where(varies(found.std), found.deviation / jnp.where(varies(by), by + eps, 1), 0)


def _group(config: AdvantageConfig, given: _Scores):
    signal = given.reward - given.penalty
    return _normalised(group_moments(signal, given.scorable, config.ddof), config.eps), signal


def _batch(config: AdvantageConfig, given: _Scores):
    signal = given.reward - given.penalty
    std = moments(signal, given.scorable, (0, 1), config.ddof).std
    return _normalised(group_moments(signal, given.scorable, config.ddof), config.eps, std), signal


def _none(config: AdvantageConfig, given: _Scores):
    signal = given.reward - given.penalty
    return group_moments(signal, given.scorable).deviation, signal


def _rloo(config: AdvantageConfig, given: _Scores):
    signal = given.reward - given.penalty
    found = group_moments(signal, given.scorable)
    return found.deviation * (found.count / jnp.maximum(found.count - 1, 1)), signal


def _per_reward(config: AdvantageConfig, given: _Scores):
    present = ~jnp.isnan(given.rewards) & given.scorable[..., None]
    each = _normalised(moments(given.rewards, present, 1, config.ddof), config.eps)
    signal = (each * given.weights).sum(-1) - given.penalty
    return _normalised(moments(signal, given.scorable, (0, 1), config.ddof), config.eps), signal


ADVANTAGES = {
    "group": _group,
    "batch": _batch,
    "none": _none,
    "rloo": _rloo,
    "per_reward": _per_reward,
}  # name -> (config, scores) -> (advantages, the signal [Q, G] whose differences they are)


@checked
def advantages(
    config: AdvantageConfig,
    rewards: Float[Array, "Q G K"],
    weights: Float[Array, " K"],
    *,
    rows: Bool[Array, "Q G"] | None = None,
    penalty: Float[Array, "Q G"] | None = None,
) -> tuple[Float[Array, "Q G"], AdvantageInfo]:
    """Advantages of completions, by the option `config.name` (equations above).

    Args:
        rewards: NaN where a reward does not apply.
        weights: of the reward functions.
        rows: False in padding; default: all are real.
        penalty: taken off the sum of rewards before normalisation (KL in the reward); with "per_reward" off the sum
            of normalised rewards. Part of `info.zero_std`, not of `info.reward`, `mean` and `std`.
    """
    rewards, weights = wide(rewards), wide(weights)
    present = ~jnp.isnan(rewards)
    scorable = present.any(-1) if rows is None else present.any(-1) & rows
    reward = jnp.where(present, rewards * weights, 0).sum(-1)
    penalty = jnp.zeros_like(reward) if penalty is None else zeroed(penalty, scorable)
    A, signal = ADVANTAGES[config.name](config, _Scores(rewards, weights, penalty, reward, scorable))
    groups, learns = scorable.any(1), varies(group_moments(signal, scorable).std)
    A = jnp.where(scorable & learns, A, 0)
    A = jnp.clip(A, -config.clip, config.clip) if config.clip else A
    found = group_moments(reward, scorable, config.ddof)
    info = AdvantageInfo(
        jnp.where(scorable, reward, jnp.nan), scorable, found.mean[:, 0], found.std[:, 0], groups,
        groups & ~learns[:, 0],
    )  # fmt: skip
    return jax.lax.stop_gradient((A, info))


@checked
def step_advantages(
    config: AdvantageConfig, step_rewards: Float[Array, "Q G N"], mask: Bool[Array, "Q G N"]
) -> Float[Array, "Q G N"]:
    """Process supervision (2402.03300, 4.1.3): rewards stand at the token that ends a step, NaN elsewhere.

    They are normalised over all steps of the group; a token's advantage is the sum over steps that end at or after it.
    """
    ends = mask & ~jnp.isnan(step_rewards)
    each = _normalised(moments(wide(step_rewards), ends, (1, 2), config.ddof), config.eps)
    later = jnp.flip(jnp.cumsum(jnp.flip(each, -1), -1), -1)
    return jax.lax.stop_gradient(zeroed(later, mask))


@checked
def add_entropy(
    config: AdvantageConfig,
    advantages: Float[Array, "Q G"] | Float[Array, "Q G N"],
    entropy: Float[Array, "Q G N"],
    mask: Bool[Array, "Q G N"],
) -> Float[Array, "Q G N"]:
    """A + min(entropy_bonus * H, |A| / entropy_bonus_cap), H constant (2506.14758): uncertain tokens count for more."""
    A = per_token(advantages)
    bonus = jnp.minimum(config.entropy_bonus * entropy, jnp.abs(A) / config.entropy_bonus_cap)
    return jax.lax.stop_gradient(zeroed(A + bonus, mask))
