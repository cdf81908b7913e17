"""AdamW with global-norm clipping and a weight-decay mask by parameter name."""

import dataclasses
import re

import jax
import optax

from attnlab.training.schedules import ScheduleConfig
from attnlab.training.trees import path_name


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled, times the learning rate
    no_decay: str = (  # parameters whose path matches are not decayed
        r"(bias|scale|sink|alpha|frequencies|lambda_param|slope_logit)$"
    )
    clip_norm: float = 1.0  # of the whole gradient; 0: no clipping
    schedule: ScheduleConfig = ScheduleConfig()

    def validate(self, steps: int) -> None:
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"optimizer.b1={self.b1} and b2={self.b2} must lie in [0, 1)")
        if self.weight_decay < 0 or self.clip_norm < 0 or self.eps <= 0:
            raise ValueError(
                f"optimizer.weight_decay={self.weight_decay} and clip_norm={self.clip_norm} must not be negative, "
                f"and eps={self.eps} must be positive"
            )
        try:
            re.compile(self.no_decay)
        except re.error as error:
            raise ValueError(
                f"optimizer.no_decay={self.no_decay!r} is not a regular expression: {error}"
            ) from error
        self.schedule.validate(steps)


NEVER_TRAINED = re.compile(
    r"(^|/)frozen_"
)  # modules stop the gradient of such parameters; decay must not move them


def decay_mask(params, no_decay: str):
    """A tree of bools like `params`: True where weight decay applies."""
    pattern = re.compile(no_decay)

    def decays(path, _):
        name = path_name(path)
        return not (pattern.search(name) or NEVER_TRAINED.search(name))

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradient -> direction of the update; `train_step` multiplies it by minus the learning rate.

    The rate stays outside because it follows the run's step count, which goes on when a step is skipped.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=lambda p: decay_mask(p, config.no_decay)),
    )
