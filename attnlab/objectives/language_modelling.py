"""Next-token prediction: cross-entropy in float32 over the counted targets, with an optional z-loss.

    nll_t = logsumexp(logits_t) - logits_t[target_t],   loss_t = nll_t + z_loss * logsumexp(logits_t)^2

The logits [B, T, V] are never whole in memory; see `kernels.log_prob`. Letters: B batch, T length, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.models.config import ModelConfig
from attnlab.models.language_model import LanguageModel, forward_flops
from attnlab.objectives.objective import Terms
from kernels.log_prob import IMPLEMENTATIONS, TokenLogProbs

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LanguageModellingConfig:
    z_loss: float = 0.0  # keeps the normaliser near 1; PaLM uses 1e-4
    implementation: str = ""  # of kernels.log_prob, by name; "": the best for the platform compiled for

    def validate(self) -> None:
        names = [each.name for each in IMPLEMENTATIONS]
        if self.implementation and self.implementation not in names:
            raise ValueError(
                f"objective.implementation={self.implementation!r} is unknown; choose one of {', '.join(names)}, or ''"
            )
        if self.z_loss < 0:
            raise ValueError(f"objective.z_loss={self.z_loss} is negative; use 0 for none")


def token_losses(logits: Array, targets: Array) -> tuple[Array, Array]:
    """nll and logsumexp, both [B, T] float32, of logits [B, T, V] at hand, against targets int32 [B, T]."""
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

    def inputs(self, batch: dict[str, Array]) -> dict[str, Any]:
        """What the model is told beside the tokens."""
        return {"positions": batch["positions"], "segments": batch["segments"]}

    def logits(self, params: Any, batch: dict[str, Array]) -> Array:
        """[B, T, V] float32: for looking at a model; training and evaluation do without."""
        return self.module.apply({"params": params}, batch["tokens"], **self.inputs(batch))

    def log_probs(self, params: Any, batch: dict[str, Array], **options) -> TokenLogProbs:
        """What the model says about the targets, arrays [B, T]; options as for `LanguageModel.log_probs`."""
        return self.module.apply(
            {"params": params},
            batch["tokens"],
            batch["targets"],
            implementation=self.options.implementation or None,
            method="log_probs",
            **options,
            **self.inputs(batch),
        )

    def __call__(self, params: Any, batch: dict[str, Array], rng: Array) -> Terms:
        """Terms of a batch; rng is unused, as nothing here is random."""
        del rng
        said = self.log_probs(params, batch, return_entropy=False, return_argmax=True)
        weights = batch["weights"]
        nll_sum, count = -jnp.sum(said.logp * weights), jnp.sum(weights)
        z_sum = jnp.sum(jnp.square(said.lse) * weights)
        hits = jnp.sum((said.argmax == batch["targets"]) * weights)
        metrics = {
            "nll": (nll_sum, count),
            "bits_per_byte": (nll_sum / math.log(2), jnp.sum(batch["bytes"] * weights)),
            "accuracy": (hits, count),
            "log_normaliser_squared": (z_sum, count),
        }
        return Terms(nll_sum + self.options.z_loss * z_sum, count, metrics)

    def forward_flops_per_token(self) -> float:
        return forward_flops(self.model, self.sequence_length)
