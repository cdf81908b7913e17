"""How fast a run trains: a clock that survives restarts, and the fraction of the hardware's peak (MFU).

Time spent on evaluation and checkpoints is paused out, so tokens per second means training alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets; the first text found in the device
# kind wins. A TPU7x chip (2307 TFLOP/s) shows as two devices.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p; its kind is "TPU v5" or "TPU v5p"
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 2307e12 / 2),
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("B200", 2250e12),
)


_MEBI = 2**20


def peak_flops(device: jax.Device, override: float | None = None) -> float | None:
    """Peak FLOP/s of one device, or None if its kind is unknown (a CPU, for one): then no MFU is reported."""
    if override is not None:
        if override <= 0:
            raise ValueError(f"peak FLOP/s {override=} must be positive; leave it out to use the table.")
        return override
    kind = device.device_kind.lower()
    return next((flops for name, flops in PEAK_FLOPS if name.lower() in kind), None)


def model_flops_utilisation(flops_per_second: float, peak: float | None, devices: int) -> float | None:
    """Model FLOP/s of the whole job over the peak of its devices, as a fraction; None without a peak."""
    return None if peak is None else flops_per_second / (peak * devices)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Averages over the steps since the last report."""

    tokens_per_second: float
    step_seconds: float
    data_wait_fraction: float  # of the training time, spent waiting for the input


@dataclasses.dataclass
class _Totals:
    seconds: float = 0.0
    tokens: float = 0.0
    steps: float = 0.0
    waited: float = 0.0  # seconds


class Clock:
    """Counts trained seconds, tokens and steps, without the time inside `paused()`.

    Example::

        clock.start()
        for batch in batches:
            with clock.waiting(): ...   # fetch the input
            ...                         # the step
            clock.tick(tokens)
            with clock.paused(): ...    # evaluate, save
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._totals = _Totals()
        self._reported = _Totals()
        self._mark = now()  # time is counted up to here
        self._pauses = 0  # nesting depth

    def start(self) -> None:
        """Begins counting from now; what came before (building, compiling) is left out."""
        self._mark = self._now()

    def tick(self, tokens: int, steps: int = 1) -> None:
        """Counts finished steps, their tokens over all devices, and the time since the last tick."""
        self._count_up_to_now()
        self._totals.tokens += tokens
        self._totals.steps += steps

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside out of everything; may be nested."""
        self._count_up_to_now()
        self._pauses += 1
        try:
            yield
        finally:
            self._count_up_to_now()
            self._pauses -= 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for data, unless the clock is paused."""
        began = self._now()
        try:
            yield
        finally:
            if not self._pauses:
                self._totals.waited += self._now() - began

    def rates(self) -> Rates | None:
        """Averages since the last call, or None if no step was counted since then."""
        seconds, tokens, steps, waited = (
            getattr(self._totals, field.name) - getattr(self._reported, field.name)
            for field in dataclasses.fields(_Totals)
        )
        if steps == 0 or seconds <= 0:
            return None
        self._reported = dataclasses.replace(self._totals)
        return Rates(tokens / seconds, seconds / steps, min(waited / seconds, 1.0))

    @property
    def seconds(self) -> float:
        """Trained seconds, over all runs of this training."""
        return self._totals.seconds

    @property
    def tokens(self) -> int:
        """Trained tokens, over all runs of this training."""
        return int(self._totals.tokens)

    def state(self) -> dict[str, float]:
        """The totals as plain numbers, to be saved with the training state.

        Tokens are split (units of 2**20, and the rest), so that float32 holds them exactly up to 2**44.
        """
        mebitokens, tokens = divmod(self._totals.tokens, _MEBI)
        return {**dataclasses.asdict(self._totals), "mebitokens": mebitokens, "tokens": tokens}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], now: Callable[[], float] = time.monotonic) -> Clock:
        """A clock that goes on from `state()`; the time between is not counted."""
        clock = cls(now)
        values = {name: float(value) for name, value in state.items()}
        values["tokens"] += _MEBI * values.pop("mebitokens")
        clock._totals = _Totals(**values)
        clock._reported = dataclasses.replace(clock._totals)
        return clock

    def _count_up_to_now(self) -> None:
        now = self._now()
        if not self._pauses:
            self._totals.seconds += now - self._mark
        self._mark = now
