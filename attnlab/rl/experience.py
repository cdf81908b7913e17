"""What a rollout teaches: advantages, the rollout policy's log-probabilities and entropies, weights, and their metrics.

Letters: Q prompts, G completions of each (a group), P prompt length, N completion length, K reward functions.

Everything here is a constant to the updates that follow. It is computed once a rollout on the whole global batch, so
group and batch statistics are exact whatever the mesh, the minibatches and the micro-batches.
"""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.models.language_model import LanguageModel
from attnlab.rl.advantages import AdvantageInfo, add_entropy, advantages
from attnlab.rl.completions import drop_truncated
from attnlab.rl.config import GRPOConfig
from attnlab.rl.corrections import correction, entropy_threshold, top_tokens
from attnlab.rl.divergences import reward_penalty
from attnlab.rl.masked import pooled_mean, row_mean, zeroed
from attnlab.rl.rollout import Rollout, score_tokens
from attnlab.rl.sequence_weights import sequence_weights, statistics

Array = jax.Array
Batch = dict[str, Array]


def needs_old_pass(config: GRPOConfig) -> bool:
    """Whether the rollout policy has to be asked about its own completions before the first update.

    With one update a rollout it is the policy being updated, and nothing else that is wanted here comes from it.
    """
    weights = config.weights.name == "egsw" and config.weights.entropy_source == "old"
    corrected = config.correction.name != "none" or config.correction.top_entropy > 0
    in_reward = config.kl.beta > 0 and config.kl.in_reward
    return config.updates > 1 or weights or corrected or in_reward or config.advantage.entropy_bonus > 0


def make_experience(
    config: GRPOConfig,
    model: LanguageModel,
    params: Any,
    reference: Any | None,
    prompts: Array,
    starts: Array,
    rollout: Rollout,
    rewards: Array,
    groups: Array,
    reward_weights: Array,
    *,
    implementation: str | None = None,
) -> tuple[Batch, dict[str, Array]]:
    """(batch, metrics): arrays [Q, ..] for the objective, and scalars. Pure and traceable.

    params: of the policy that made the rollout; reference: of the reference policy, None without a KL term; rewards
    float32 [Q, G, K], NaN where one does not apply; groups bool [Q], False in padding; reward_weights [K].
    """
    rows = jnp.broadcast_to(groups[:, None], rollout.truncated.shape)
    drawn = rollout.mask & rows[..., None]
    mask = drop_truncated(drawn, rollout.truncated) if config.mask_truncated else drawn
    batch = {"prompts": prompts, "starts": starts, "ids": rollout.ids, "mask": mask, "rows": rows}
    batch["behaviour_logp"] = rollout.logp

    def ask(params, return_entropy):
        return score_tokens(
            model,
            params,
            prompts,
            starts,
            rollout.ids,
            drawn,
            config.rollout.temperature,
            return_entropy=return_entropy,
            implementation=implementation,
        )

    entropy, metrics = None, {}
    if needs_old_pass(config):
        batch["old_logp"], entropy = ask(params, True)
        metrics |= mismatch(batch["old_logp"], rollout.logp, drawn)
    if reference is not None:
        batch["ref_logp"], _ = ask(reference, False)
    penalty = None
    if reference is not None and config.kl.in_reward:
        penalty = reward_penalty(config.kl, batch["old_logp"], batch["ref_logp"], drawn)
    A, info = advantages(
        config.advantage, rewards, reward_weights, rows=rows & drawn.any(-1), penalty=penalty
    )
    if config.advantage.entropy_bonus:
        A = add_entropy(config.advantage, A, entropy, drawn)
    batch |= {"advantages": A, "scorable": info.scorable}
    if config.weights.name == "egsw" and config.weights.entropy_source == "old":
        vocab = model.config.vocab_size
        w = sequence_weights(config.weights, A, entropy, mask, vocab, rows=info.scorable)
        batch["weights"] = w
        metrics |= statistics(config.weights, w, A, entropy, mask, vocab, rows=info.scorable)
    if config.correction.name != "none" or config.correction.top_entropy:
        batch["factors"], found = _factors(config, batch, entropy, mask)
        metrics |= found
    if entropy is not None:
        batch["entropy"] = row_mean(entropy, drawn)  # for the table of completions
    return batch, metrics | reward_metrics(rewards, info, rows) | length_metrics(rollout, drawn) | _spread(
        A, mask
    )


def _factors(config: GRPOConfig, batch: Batch, entropy: Array, mask: Array) -> tuple[Array, dict[str, Array]]:
    """Correction of the rollout's mismatch, times the choice of tokens."""
    factors = correction(config.correction, batch["old_logp"], batch["behaviour_logp"], mask)
    metrics = {}
    if config.correction.name != "none":
        metrics = {f"is_ratio/{name}": value for name, value in _range(factors, mask).items()}
    if config.correction.top_entropy:
        chosen = top_tokens(entropy, mask, entropy_threshold(config.correction, entropy, mask))
        factors = factors * chosen
        metrics["top_entropy/fraction"] = pooled_mean(chosen, mask)
    return factors, metrics


def mismatch(logp: Array, behaviour_logp: Array, mask: Array) -> dict[str, Array]:
    """How far the trainer's log-probabilities are from the sampler's: rounding, unless something is wrong."""
    difference = jnp.abs(zeroed(logp, mask) - zeroed(behaviour_logp, mask))
    return {
        "sampling/logp_diff_mean": pooled_mean(difference, mask),
        "sampling/logp_diff_max": difference.max(),
    }


def _range(x: Array, mask: Array) -> dict[str, Array]:
    """Least, mean and most of what the mask holds; 0 where it holds nothing."""
    return {
        "min": jnp.where(mask.any(), jnp.where(mask, x, jnp.inf).min(), 0),
        "mean": pooled_mean(x, mask),
        "max": jnp.where(mask.any(), jnp.where(mask, x, -jnp.inf).max(), 0),
    }


def _spread(A: Array, mask: Array) -> dict[str, Array]:
    there = mask if A.ndim == 3 else mask.any(-1)
    found = _range(A, there)
    return {
        "advantage/min": found["min"],
        "advantage/max": found["max"],
        "advantage/abs_mean": pooled_mean(jnp.abs(A), there),
    }


def reward_metrics(rewards: Array, info: AdvantageInfo, rows: Array) -> dict[str, Array]:
    """Means over groups of the summed reward and its deviation within the group; of each function, where it applies.

    The functions come as rewards/<number>/..; whoever knows their names renames them.
    """
    metrics = {
        "reward": pooled_mean(info.reward, info.scorable),
        "reward_std": pooled_mean(info.std, info.groups),
        "frac_reward_zero_std": pooled_mean(info.zero_std, info.groups),
        "unscorable": pooled_mean(~info.scorable, rows),
    }
    for k in range(rewards.shape[-1]):
        applies = ~jnp.isnan(rewards[..., k]) & info.scorable
        mean = pooled_mean(rewards[..., k], applies)
        spread = pooled_mean(jnp.square(rewards[..., k] - mean), applies)
        metrics |= {f"rewards/{k}/mean": mean, f"rewards/{k}/std": jnp.sqrt(spread)}
    return metrics


def length_metrics(rollout: Rollout, mask: Array) -> dict[str, Array]:
    """Lengths of completions in tokens, of those that ended by themselves, and the fraction that did not."""
    rows, lengths = mask.any(-1), rollout.lengths.astype(jnp.float32)
    every, ended = _range(lengths, rows), _range(lengths, rows & ~rollout.truncated)
    metrics = {f"completions/{name}_length": value for name, value in every.items()}
    metrics |= {f"completions/{name}_terminated_length": value for name, value in ended.items()}
    return metrics | {"completions/clipped_ratio": pooled_mean(rollout.truncated, rows)}
