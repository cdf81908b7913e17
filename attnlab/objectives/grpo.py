"""Group relative policy optimisation (arXiv 2402.03300), with every part exchangeable; EGSW is one of its weightings.

    l_it = w_it f_it l_policy(rho_it, A_it) + beta kl_it          loss = aggregate(l) - coefficient * mean entropy

A batch is what `attnlab.rl.experience` made of a rollout, whole groups of it: advantages, log-probabilities of the
policy that drew the completions and of the reference, sequence weights. On-policy the loss of plain GRPO is 0 whatever
the rewards (advantages have mean 0); its gradient is not, so watch the reward instead. With EGSW it is below 0.

Letters: Q prompts, G completions of each (a group), P prompt length, N completion length, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.models.config import ModelConfig
from attnlab.models.language_model import LanguageModel, forward_flops
from attnlab.objectives.objective import Terms
from attnlab.rl.config import GRPOConfig
from attnlab.rl.corrections import on_policy_rows
from attnlab.rl.masked import per_token, zeroed
from attnlab.rl.policy_losses import clip_statistics
from attnlab.rl.rollout import score_tokens
from attnlab.rl.sequence_weights import sequence_weights, statistics
from attnlab.rl.surrogate import Surrogate, items_per_token, loss_terms, surrogate

Array = jax.Array
Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class GRPO:
    """The objective of a model; see `finish_batch` for what a batch has to hold."""

    model: ModelConfig
    options: GRPOConfig
    implementation: str = ""  # of kernels.log_prob, by name; "": the best for the platform compiled for

    @property
    def module(self) -> LanguageModel:
        return LanguageModel(self.model)

    def init(self, rng: Array) -> Any:
        """Float32 parameters; their shapes do not depend on the batch."""
        return self.module.init(rng, jnp.zeros((1, 2), jnp.int32))["params"]

    def __call__(self, params: Any, batch: Batch, rng: Array) -> Terms:
        """Terms of a (micro-)batch of whole groups; rng is unused, as nothing here is random."""
        del rng
        options, mask = self.options, batch["mask"]
        logp, entropy = score_tokens(
            self.module,
            params,
            batch["prompts"],
            batch["starts"],
            batch["ids"],
            mask,
            options.rollout.temperature,
            implementation=self.implementation or None,
        )
        weights, weight_metrics = self._weights(batch, entropy)
        parts = surrogate(
            options,
            logp,
            batch.get("old_logp"),
            batch["advantages"],
            mask,
            ref_logp=batch.get("ref_logp"),
            weights=weights,
            factors=self._factors(batch, logp),
        )
        loss_sum, weight = loss_terms(
            options,
            parts.total,
            mask,
            rows=batch["rows"],
            entropy=entropy,
            coefficient=batch["coefficient"][0],
            per_token_items=batch["per_token_items"][0],
        )
        metrics = self._metrics(batch, logp, entropy, parts) | weight_metrics
        return Terms(loss_sum, weight, metrics, self._extremes(batch, logp))

    def _weights(self, batch: Batch, entropy: Array) -> tuple[Array | None, dict[str, tuple[Array, Array]]]:
        """The rollout policy's weights if the batch has them, else those of the policy as it is now."""
        config, mask = self.options.weights, batch["mask"]
        if "weights" in batch or config.name == "none":
            return batch.get("weights"), {}
        given = (batch["advantages"], entropy, mask, self.model.vocab_size)
        w = sequence_weights(config, *given, rows=batch["scorable"])
        found = statistics(config, w, *given, rows=batch["scorable"])
        groups = _count(mask.any((1, 2)))
        return w, {name: (value * groups, groups) for name, value in found.items()}

    def _factors(self, batch: Batch, logp: Array) -> Array | None:
        if not self.options.correction.off_policy_threshold:
            return batch.get("factors")
        given = (batch["behaviour_logp"], batch["advantages"], batch["mask"])
        kept = per_token(on_policy_rows(self.options.correction, jax.lax.stop_gradient(logp), *given))
        return batch.get("factors", jnp.ones_like(logp)) * kept

    def _metrics(self, batch: Batch, logp, entropy, parts: Surrogate) -> dict[str, tuple[Array, Array]]:
        """Means over scored tokens, with TRL's names where it has them."""
        mask = batch["mask"]
        old = batch.get("old_logp", jax.lax.stop_gradient(logp))
        clipped = clip_statistics(self.options.policy_loss, logp, old, batch["advantages"], mask)
        values = {
            "policy_loss": parts.policy,
            "entropy": entropy,
            "ppo_kl": zeroed(old, mask) - zeroed(logp, mask),
            "ratio/mean": parts.ratio,
            "clip_ratio/low_mean": clipped.low,
            "clip_ratio/high_mean": clipped.high,
            "clip_ratio/region_mean": clipped.region,
            "clip_ratio/capped_mean": clipped.capped,
        }
        if "ref_logp" in batch:
            values["kl"] = parts.kl
        count = _count(mask)
        return {name: (zeroed(value, mask).sum(), count) for name, value in values.items()}

    def _extremes(self, batch: Batch, logp: Array) -> dict[str, Array]:
        """How many tokens of a group are clipped; before any update, how far the trainer is from the sampler."""
        mask = batch["mask"]
        if "old_logp" not in batch:
            off = jnp.abs(zeroed(logp, mask) - zeroed(batch["behaviour_logp"], mask))
            return {"sampling/logp_diff_max": off.max()}
        given = (logp, batch["old_logp"], batch["advantages"], mask)
        clipped = clip_statistics(self.options.policy_loss, *given)
        tokens = jnp.maximum(mask.sum((1, 2)), 1)
        return {
            "clip_ratio/low_min": (clipped.low.sum((1, 2)) / tokens).min(),
            "clip_ratio/high_max": (clipped.high.sum((1, 2)) / tokens).max(),
        }

    def forward_flops_per_token(self) -> float:
        """Of a whole prompt and completion, as one pass of the model over it."""
        rollout = self.options.rollout
        return forward_flops(self.model, rollout.max_prompt_tokens + rollout.max_new_tokens)


def finish_batch(options: GRPOConfig, batch: Batch, coefficient: Array) -> Batch:
    """One optimiser batch of Q groups: what its micro-batches need to know of the whole of it, a copy a group.

    coefficient [] of the entropy bonus. Taken out of a batch of `make_experience`, or all of it.
    """
    groups = batch["mask"].shape[0]
    items = items_per_token(options, batch["mask"], rows=batch["rows"])
    return batch | {
        "coefficient": jnp.full(groups, coefficient, jnp.float32),
        "per_token_items": jnp.full(groups, items, jnp.float32),
    }


def _count(mask: Array) -> Array:
    return mask.sum().astype(jnp.float32)
