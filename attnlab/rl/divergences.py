"""Estimators of the distance to a reference policy from the tokens that were drawn.

Letters: Q prompts, G completions of each, N completion length; d = ref_logp - logp, sg stop-gradient.

    k1   -d                     k2   d^2 / 2              k3   e^d - d - 1, d kept within +-20           abs   |d|
    k3_plus   k2 - sg(k2) + sg(k3): the value of k3, the gradient of k2

As a term of the loss k1 regularises nothing: its gradient is a score function, zero on average. On-policy, that of k2
is the gradient of KL(policy || reference), and that of k3 the one of KL(reference || policy).
"""

import jax
import jax.numpy as jnp

from attnlab.rl.config import KLConfig
from attnlab.rl.masked import zeroed
from kernels.signatures import Array, Bool, Float, checked

CLAMP = 20.0  # of d before exp

sg = jax.lax.stop_gradient


def _k2(d):
    return jnp.square(d) / 2


def _k3(d):
    d = jnp.clip(d, -CLAMP, CLAMP)
    return jnp.expm1(d) - d


def _k3_plus(d):
    return _k2(d) - sg(_k2(d)) + sg(_k3(d))


KL_ESTIMATORS = {"k1": jnp.negative, "k2": _k2, "k3": _k3, "abs": jnp.abs, "k3_plus": _k3_plus}


@checked
def divergence(
    config: KLConfig,
    logp: Float[Array, "Q G N"],
    ref_logp: Float[Array, "Q G N"],
    mask: Bool[Array, "Q G N"],
    ratio: Float[Array, "Q G N"] | None = None,
) -> Float[Array, "Q G N"]:
    """Estimate at each token, without beta; 0 where nothing is scored. ref_logp is a constant.

    ratio: policy over old policy, whose gradient flows; needed with `config.is_correct`, which multiplies by it
    (DeepSeek-V3.2: the estimate is then of the current policy although the old one drew the tokens).
    """
    kl = KL_ESTIMATORS[config.estimator](zeroed(sg(ref_logp), mask) - zeroed(logp, mask))
    if config.is_correct:
        if ratio is None:
            raise ValueError(
                "grpo.kl.is_correct=True multiplies by the policy's ratio, got ratio=None; give it"
            )
        kl = kl * ratio
    return zeroed(kl, mask)


@checked
def reward_penalty(
    config: KLConfig,
    old_logp: Float[Array, "Q G N"],
    ref_logp: Float[Array, "Q G N"],
    mask: Bool[Array, "Q G N"],
) -> Float[Array, "Q G"]:
    """beta sum_t (old_logp - ref_logp), to be taken off the reward before normalisation (`config.in_reward`)."""
    return sg(config.beta * (zeroed(old_logp, mask) - zeroed(ref_logp, mask)).sum(-1))
