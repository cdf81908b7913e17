"""Next-token prediction: cross-entropy in float32 over the counted targets, with an optional z-loss.

    nll_t = logsumexp(logits_t) - logits_t[target_t],   loss_t = nll_t + z_loss * logsumexp(logits_t)^2

Letters: B batch, T length, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.models.config import ModelConfig
from attnlab.models.language_model import LanguageModel, forward_flops
from attnlab.objectives.objective import Terms

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LanguageModellingConfig:
    z_loss: float = 0.0  # keeps the normaliser near 1; PaLM uses 1e-4

    def validate(self) -> None:
        if self.z_loss < 0:
            raise ValueError(f"objective.z_loss={self.z_loss} is negative; use 0 for none")


def token_losses(logits: Array, targets: Array) -> tuple[Array, Array]:
    """nll and logsumexp, both [B, T] float32, of logits [B, T, V] against targets int32 [B, T]."""
    wide = jnp.promote_types(jnp.float32, logits.dtype)
    logits = logits.astype(wide)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], lse


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """The language-modelling objective of a model; batches are dicts as made by `attnlab.data`."""

    model: ModelConfig
    options: LanguageModellingConfig
    sequence_length: int

    @property
    def module(self) -> LanguageModel:
        return LanguageModel(self.model)

    def init(self, rng: Array) -> Any:
        """Float32 parameters; their shapes do not depend on the batch."""
        return self.module.init(rng, jnp.zeros((1, 2), jnp.int32))["params"]

    def logits(self, params: Any, batch: dict[str, Array]) -> Array:
        return self.module.apply(
            {"params": params}, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
        )

    def __call__(self, params: Any, batch: dict[str, Array], rng: Array) -> Terms:
        """Terms of a batch; rng is unused, as nothing here is random."""
        del rng
        logits = self.logits(params, batch)
        weights = batch["weights"]
        nll, lse = token_losses(logits, batch["targets"])
        nll_sum, count = jnp.sum(nll * weights), jnp.sum(weights)
        z_sum = jnp.sum(jnp.square(lse) * weights)
        hits = jnp.sum((jnp.argmax(logits, axis=-1) == batch["targets"]) * weights)
        metrics = {
            "nll": (nll_sum, count),
            "bits_per_byte": (nll_sum / math.log(2), jnp.sum(batch["bytes"] * weights)),
            "accuracy": (hits, count),
            "log_normaliser_squared": (z_sum, count),
        }
        return Terms(nll_sum + self.options.z_loss * z_sum, count, metrics)

    def forward_flops_per_token(self) -> float:
        return forward_flops(self.model, self.sequence_length)
