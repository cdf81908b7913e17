"""The surrogate of a token, to be minimised, whose gradient is the policy gradient.

Letters: Q prompts, G completions of each, N completion length; A advantage, rho ratio, e_low and e_high widths of the
clip, sg stop-gradient.

    rho = e^(logp - old_logp)                                        log-ratios are kept within +-log_ratio_clamp
    clip         l = -min(rho A, clip(rho, 1 - e_low, 1 + e_high) A)             GRPO, 2402.03300; DAPO, 2503.14476
                 with ratio_cap c: min(rho, c) for the first rho. It acts where A < 0 only, and is both the two-sided
                 clip ("delta") and the dual clip (c)
    gspo         the same with s_i = e^(mean_t (logp - old_logp)) for rho                        GSPO, 2507.18071
    cispo        l = -sg(clip(rho, cispo_min, cispo_max)) A logp                                 CISPO, 2506.13585
    reinforce    l = -A logp

With one update a rollout, old_logp = sg(logp): every rho is 1, and all four have the gradient of -A logp.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.rl.config import PolicyLossConfig
from attnlab.rl.masked import per_token, row_mean, zeroed
from kernels.signatures import Array, Bool, Float, checked

sg = jax.lax.stop_gradient


class ClipStatistics(NamedTuple):
    """Scored tokens, bool [Q, G, N], whose gradient the clip stops: below with A < 0, above with A > 0, either; and
    those the ratio cap stops. For "gspo" all tokens of a row alike; for "cispo" where the ratio leaves its bounds."""

    low: Array
    high: Array
    region: Array
    capped: Array


def log_ratio(config: PolicyLossConfig, logp: Array, old_logp: Array, mask: Array) -> Array:
    """log rho [Q, G, N] within +-log_ratio_clamp, 0 where nothing is scored."""
    difference = zeroed(logp, mask) - zeroed(old_logp, mask)
    return jnp.clip(difference, -config.log_ratio_clamp, config.log_ratio_clamp)


def _token_ratio(config: PolicyLossConfig, logp, old_logp, mask, by_token):
    return jnp.exp(log_ratio(config, logp, old_logp, mask))


def _sequence_ratio(config: PolicyLossConfig, logp, old_logp, mask, by_token):
    """s_i. Where advantages differ between tokens, each token's gradient stays with its own advantage (GSPO-token)."""
    mean = row_mean(log_ratio(config, logp, old_logp, mask), mask)[..., None]
    if by_token:
        own = zeroed(logp, mask)
        return jnp.exp(own - sg(own) + sg(mean))
    return jnp.broadcast_to(jnp.exp(mean), mask.shape)


def _clip(config: PolicyLossConfig, rho, A, logp):
    capped = jnp.minimum(rho, config.ratio_cap) if config.ratio_cap else rho
    return -jnp.minimum(capped * A, jnp.clip(rho, 1 - config.eps_low, 1 + config.eps_high) * A)


def _cispo(config: PolicyLossConfig, rho, A, logp):
    return -sg(jnp.clip(rho, config.cispo_min, config.cispo_max)) * A * logp


def _reinforce(config: PolicyLossConfig, rho, A, logp):
    return -A * logp


class PolicyLoss(NamedTuple):
    """ratio(config, logp, old_logp, mask, by_token) and loss(config, ratio, A, logp), both -> [Q, G, N]."""

    ratio: Callable
    loss: Callable


POLICY_LOSSES = {
    "clip": PolicyLoss(_token_ratio, _clip),
    "gspo": PolicyLoss(_sequence_ratio, _clip),
    "cispo": PolicyLoss(_token_ratio, _cispo),
    "reinforce": PolicyLoss(_token_ratio, _reinforce),
}


@checked
def policy_ratio(
    config: PolicyLossConfig,
    logp: Float[Array, "Q G N"],
    old_logp: Float[Array, "Q G N"],
    mask: Bool[Array, "Q G N"],
    *,
    by_token: bool = False,
) -> Float[Array, "Q G N"]:
    """The ratio the loss uses, s_i for "gspo"; 1 in rows without scored tokens. Its gradient to logp flows.

    by_token: for "gspo", whether the gradient of a token's s_i goes to this token alone (same value).
    """
    return POLICY_LOSSES[config.name].ratio(config, logp, sg(old_logp), mask, by_token)


@checked
def policy_loss(
    config: PolicyLossConfig,
    logp: Float[Array, "Q G N"],
    old_logp: Float[Array, "Q G N"],
    advantages: Float[Array, "Q G"] | Float[Array, "Q G N"],
    mask: Bool[Array, "Q G N"],
) -> Float[Array, "Q G N"]:
    """Loss of each token by the option `config.name` (equations above), 0 where nothing is scored.

    logp carries the gradient; old_logp and advantages are constants.
    """
    rho = policy_ratio(config, logp, old_logp, mask, by_token=advantages.ndim == 3)
    A = zeroed(per_token(sg(advantages)), mask)
    return zeroed(POLICY_LOSSES[config.name].loss(config, rho, A, zeroed(logp, mask)), mask)


@checked
def clip_statistics(
    config: PolicyLossConfig,
    logp: Float[Array, "Q G N"],
    old_logp: Float[Array, "Q G N"],
    advantages: Float[Array, "Q G"] | Float[Array, "Q G N"],
    mask: Bool[Array, "Q G N"],
) -> ClipStatistics:
    """Which tokens are clipped, on the ratio before clipping; none with "reinforce"."""
    rho = sg(policy_ratio(config, logp, old_logp, mask))
    A = zeroed(per_token(advantages), mask)
    none = jnp.zeros_like(mask)
    if config.name == "reinforce":
        return ClipStatistics(none, none, none, none)
    if config.name == "cispo":
        low, high = mask & (rho < config.cispo_min), mask & (rho > config.cispo_max)
        return ClipStatistics(low, high, low | high, none)
    low, high = (A < 0) & (rho < 1 - config.eps_low), (A > 0) & (rho > 1 + config.eps_high)
    capped = (A < 0) & (rho > config.ratio_cap) if config.ratio_cap else none
    return ClipStatistics(low, high, low | high, capped)
