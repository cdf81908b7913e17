"""The loss of GRPO with everything that may enter it, in the order of multiplications that the sources have.

Letters: Q prompts, G completions of each, N completion length; w sequence weights, f factors (`corrections`), l the
policy loss, H entropy.

    l_total = w f l + beta kl               [with weights.weight_kl: w (f l + beta kl)]          `surrogate`
    loss = aggregate(l_total) - coefficient * mean over tokens of H                              `loss_terms`
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.rl.aggregation import aggregate
from attnlab.rl.config import EntropyBonusConfig, GRPOConfig
from attnlab.rl.divergences import divergence
from attnlab.rl.masked import per_token, zeroed
from attnlab.rl.policy_losses import policy_loss, policy_ratio
from kernels.signatures import Array, Bool, Float, checked


class Surrogate(NamedTuple):
    """Of each token [Q, G, N], 0 where nothing is scored; total, what the loss aggregates, is policy + beta kl.

    policy: with weights and factors; kl: without beta and weights, zeros without a reference; ratio: of the policy.
    """

    total: Array
    policy: Array
    kl: Array
    ratio: Array


@checked
def surrogate(
    config: GRPOConfig,
    logp: Float[Array, "Q G N"],
    old_logp: Float[Array, "Q G N"] | None,
    advantages: Float[Array, "Q G"] | Float[Array, "Q G N"],
    mask: Bool[Array, "Q G N"],
    *,
    ref_logp: Float[Array, "Q G N"] | None = None,
    weights: Float[Array, "Q G"] | Float[Array, "Q G N"] | None = None,
    factors: Float[Array, "Q G N"] | None = None,
) -> Surrogate:
    """Losses of tokens, before aggregation.

    Args:
        logp: of the policy being updated; everything else is a constant, except weights with stop_gradient=False.
        old_logp: of the policy that drew the tokens; None: the same policy, ratios are 1.
        ref_logp: of the reference; needed if config.kl.beta > 0 unless the KL is in the reward.
        weights: of completions or tokens, from `sequence_weights`; None: 1.
        factors: correction times chosen tokens; None: 1.
    """
    old_logp = jax.lax.stop_gradient(logp if old_logp is None else old_logp)
    in_loss = config.kl.beta > 0 and not config.kl.in_reward
    if ref_logp is None and in_loss:
        raise ValueError(f"grpo.kl.beta={config.kl.beta} needs log-probabilities of the reference, got none")
    ratio = policy_ratio(config.policy_loss, logp, old_logp, mask, by_token=advantages.ndim == 3)
    policy = policy_loss(config.policy_loss, logp, old_logp, advantages, mask)
    w = 1.0 if weights is None else zeroed(per_token(weights), mask)
    policy = policy * w if factors is None else policy * w * jax.lax.stop_gradient(zeroed(factors, mask))
    if ref_logp is None:
        return Surrogate(policy, policy, jnp.zeros_like(policy), zeroed(ratio, mask))
    kl = divergence(config.kl, logp, ref_logp, mask, ratio)
    weighted = kl * w if config.weights.weight_kl else kl
    total = policy + config.kl.beta * weighted if in_loss else policy
    return Surrogate(total, policy, kl, zeroed(ratio, mask))


def items_per_token(config: GRPOConfig, mask: Array, *, rows: Array | None = None) -> Array:
    """The aggregation's weight over the number of scored tokens: what turns a token mean into its units."""
    weight = aggregate(config, jnp.zeros(mask.shape), mask, rows=rows)[1]
    return weight / jnp.maximum(mask.sum(), 1)


@checked
def loss_terms(
    config: GRPOConfig,
    total: Float[Array, "Q G N"],
    mask: Bool[Array, "Q G N"],
    *,
    rows: Bool[Array, "Q G"] | None = None,
    entropy: Float[Array, "Q G N"] | None = None,
    coefficient: Array | float = 0.0,
    per_token_items: Array | None = None,
) -> tuple[Array, Array]:
    """(sum, weight) of the loss: those of all micro-batches and shards are added, then divided.

    Args:
        total: `Surrogate.total`.
        entropy: carries the gradient of the bonus; None: no bonus.
        coefficient: of the bonus, a number or a scalar.
        per_token_items: `items_per_token` of the whole optimiser batch, so that the bonus is a mean over all its tokens
            whatever the micro-batches hold; default: of the arrays given.
    """
    loss_sum, weight = aggregate(config, total, mask, rows=rows)
    if entropy is None:
        return loss_sum, weight
    if per_token_items is None:
        per_token_items = items_per_token(config, mask, rows=rows)
    return loss_sum - coefficient * per_token_items * zeroed(entropy, mask).sum(), weight


def applied_coefficient(config: EntropyBonusConfig, coefficient: Array, entropy: Array) -> Array:
    """What the bonus is multiplied with: an adaptive one only while the last mean entropy is at most the target."""
    applies = entropy <= config.target if config.adaptive else True
    return jnp.where(applies, coefficient, 0)


def next_coefficient(config: EntropyBonusConfig, coefficient: Array, entropy: Array) -> Array:
    """After an update: up by delta if the batch's mean entropy is at most the target, else down, in [0, most]."""
    if not config.adaptive:
        return jnp.asarray(coefficient)
    moved = coefficient + jnp.where(entropy <= config.target, config.delta, -config.delta)
    return jnp.clip(moved, 0, config.most)
