"""Learning-rate schedules: a linear warm-up to the peak, then one of four ways down.

The rate of a step depends on the steps done before it, so the first step of a warm-up has rate 0, as in FoX.
"""

import dataclasses

import jax.numpy as jnp
import optax

SHAPES = ("cosine", "linear", "constant", "1-sqrt")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    shape: str = "cosine"  # after the warm-up: "cosine" or "linear" to the end, "constant", "1-sqrt" (WSD)
    peak: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.0  # of the peak, at the last step
    decay_fraction: float = 0.2  # "1-sqrt" only: the last part of training in which the rate falls

    def validate(self, steps: int) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"schedule.shape={self.shape!r} is unknown; choose one of {', '.join(SHAPES)}")
        if self.peak <= 0:
            raise ValueError(f"schedule.peak={self.peak} must be positive")
        if not 0 <= self.warmup_steps < max(steps, 1):
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} must be at least 0 and below training.steps={steps}; "
                "shorten the warm-up or train longer"
            )
        if not 0 <= self.final_fraction <= 1 or not 0 < self.decay_fraction <= 1:
            raise ValueError(
                f"schedule.final_fraction={self.final_fraction} and decay_fraction={self.decay_fraction} are "
                "fractions; choose them between 0 and 1"
            )


def make_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """step (0-based) -> learning rate, for a run of `steps` steps."""
    peak, low, warmup = config.peak, config.peak * config.final_fraction, config.warmup_steps
    rest = max(steps - warmup, 1)
    if config.shape == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.shape == "linear":
        after = optax.linear_schedule(peak, low, rest)
    elif config.shape == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = _one_minus_sqrt(peak, low, rest, max(round(config.decay_fraction * steps), 1))
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _one_minus_sqrt(peak: float, low: float, rest: int, decay: int) -> optax.Schedule:
    """Constant, then low + (peak - low) * (1 - sqrt(fraction of the decay done)) (arXiv 2405.18392)."""
    decay = min(decay, rest)

    def rate(step):
        done = jnp.clip((step - (rest - decay)) / decay, 0.0, 1.0)
        return low + (peak - low) * (1 - jnp.sqrt(done))

    return rate
