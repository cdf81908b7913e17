"""How a run is trained, whatever it learns."""

import dataclasses

from attnlab.training.checkpoints import CheckpointConfig
from attnlab.training.optimizer import OptimizerConfig
from attnlab.training.sharding import MeshConfig

NONFINITE = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    steps: int = 1000  # optimiser steps in all
    accumulate: int = 1  # micro-batches a step; the gradient is that of the whole batch
    seed: int = 0  # of the initial parameters and of each step's key
    log_every: int = 10  # steps between lines in the metrics files
    eval_every: int = 500  # steps between held-out evaluations; 0: only at the end
    nonfinite: str = "stop"  # when a loss or gradient is NaN or infinite: "stop", or "skip" that update
    max_skipped: int = 10  # with "skip": stop after so many skipped steps in a row
    peak_flops: float = 0.0  # of one device, for the utilisation (MFU); 0: from a table, or no MFU if unknown
    wandb: str = ""  # Weights & Biases project; "": off
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def validate(self) -> None:
        """Raise ValueError with the offending values."""
        for name, least in (
            ("steps", 1),
            ("accumulate", 1),
            ("log_every", 1),
            ("eval_every", 0),
            ("max_skipped", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"training.{name}={getattr(self, name)} must be at least {least}")
        if self.nonfinite not in NONFINITE:
            raise ValueError(
                f"training.nonfinite={self.nonfinite!r} is unknown; choose one of {', '.join(NONFINITE)}"
            )
        if self.peak_flops < 0:
            raise ValueError(
                f"training.peak_flops={self.peak_flops} is negative; use 0 for the table's value"
            )
        self.optimizer.validate(self.steps)
        self.checkpoint.validate()
