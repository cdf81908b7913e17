"""Factors of the policy term: for rollouts whose log-probabilities are not the trainer's, and for choosing tokens.

Letters: Q prompts, G completions of each, N completion length; b behaviour: the engine that drew the tokens.

    c_t = e^(old_logp_t - b_logp_t), or of a completion: c = e^(sum_t (old_logp_t - b_logp_t))
    *_truncate   min(c, most)                  *_mask   c within [least, most], else 0

All are constants, multiply the policy term and not the KL, and leave the denominators as they are.
"""

import jax
import jax.numpy as jnp

from attnlab.rl.config import CorrectionConfig
from attnlab.rl.masked import row_mean, wide, zeroed
from kernels.signatures import Array, Bool, Float, checked

CLAMP = 20.0  # of log-ratios before exp

sg = jax.lax.stop_gradient


@checked
def correction(
    config: CorrectionConfig,
    old_logp: Float[Array, "Q G N"],
    behaviour_logp: Float[Array, "Q G N"],
    mask: Bool[Array, "Q G N"],
) -> Float[Array, "Q G N"]:
    """c by the option `config.name` (all tokens of a completion alike in sequence modes); 0 where nothing is scored."""
    if config.name == "none":
        return wide(mask)
    level, _, action = config.name.partition("_")
    difference = zeroed(old_logp, mask) - zeroed(behaviour_logp, mask)
    if level == "sequence":
        difference = jnp.broadcast_to(difference.sum(-1, keepdims=True), mask.shape)
    c = jnp.exp(jnp.clip(difference, -CLAMP, CLAMP))
    within = (c >= config.least) & (c <= config.most)
    c = jnp.minimum(c, config.most) if action == "truncate" else jnp.where(within, c, 0)
    return sg(zeroed(c, mask))


@checked
def on_policy_rows(
    config: CorrectionConfig,
    logp: Float[Array, "Q G N"],
    behaviour_logp: Float[Array, "Q G N"],
    advantages: Float[Array, "Q G"] | Float[Array, "Q G N"],
    mask: Bool[Array, "Q G N"],
) -> Bool[Array, "Q G"]:
    """False for completions with A < 0 that the policy has moved away from: mean(b_logp - logp) > off_policy_threshold.

    All True with threshold 0. Advantages of tokens count with their mean.
    """
    if not config.off_policy_threshold:
        return jnp.ones(mask.shape[:2], bool)
    A = advantages if advantages.ndim == 2 else row_mean(advantages, mask)
    moved = row_mean(zeroed(behaviour_logp, mask) - zeroed(logp, mask), mask)
    return ~((A < 0) & (sg(moved) > config.off_policy_threshold))


@checked
def entropy_threshold(
    config: CorrectionConfig, entropy: Float[Array, "Q G N"], mask: Bool[Array, "Q G N"]
) -> Float[Array, ""]:
    """The (1 - top_entropy) quantile, linearly interpolated, of the entropies of all scored tokens given (2506.01939).

    Give the whole global batch. Infinite when there are no tokens, and -infinity with top_entropy 0: all are chosen.
    """
    if not config.top_entropy:
        return jnp.array(-jnp.inf, wide(entropy).dtype)
    ordered = jnp.sort(jnp.where(mask, wide(entropy), jnp.inf), axis=None)
    place = (1 - config.top_entropy) * jnp.maximum(mask.sum() - 1, 0).astype(ordered.dtype)
    below = jnp.floor(place).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, jnp.maximum(mask.sum() - 1, 0))]
    return sg(jnp.where(low == high, low, low + (high - low) * (place - below)))


def top_tokens(entropy: Array, mask: Array, threshold: Array) -> Array:
    """Scored tokens, bool [Q, G, N], whose entropy reaches the threshold."""
    return mask & (entropy >= threshold)
