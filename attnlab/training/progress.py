"""What a person sees while a run trains: a bar in a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

from attnlab.training import multihost


class Progress:
    """Shows step, what the task shows (its loss), tokens per second, MFU if known, and the time left; process 0 only.

    On a terminal this is a tqdm bar. Elsewhere a line is printed for the first step, then at most every
    `interval` seconds, and for the last step.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        interval: float = 30.0,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        """Steps run from `start` (where the run resumes) to `total`; `stream` is standard output if None."""
        self._total, self._step, self._interval, self._now = total, start, interval, now
        self._stream = stream or sys.stdout
        self._quiet = not multihost.is_main()
        self._first_step, self._began = start, now()
        self._printed: float | None = None
        self._speed: list[str] = []
        self._bar: tqdm | None = None
        if not self._quiet and self._stream.isatty():
            self._bar = tqdm(total=total, initial=start, file=self._stream, dynamic_ncols=True, unit="step")

    def rates(self, tokens_per_second: float, mfu: float | None = None) -> None:
        """The speed to show from now on; `mfu` is a fraction, None where the peak is unknown."""
        self._speed = [f"{tqdm.format_sizeof(tokens_per_second)} tokens/s"]
        if mfu is not None:
            self._speed.append(f"MFU {100 * mfu:.1f} %")

    def update(self, step: int, **shown: float) -> None:
        """Shows the state after `step`, such as `loss=2.0`, with the speed last given to `rates`."""
        if self._quiet:
            return
        parts = [*(f"{name} {value:.4f}" for name, value in shown.items()), *self._speed]
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(parts), refresh=False)
            self._bar.update(step - self._step)
        elif self._is_due(step):
            self._print([f"step {step}/{self._total}", *parts, f"ETA {self._time_left(step)}"])
        self._step = step

    def note(self, text: str) -> None:
        """Prints a line of its own without disturbing the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._print([text])

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _is_due(self, step: int) -> bool:
        now = self._now()
        due = self._printed is None or step >= self._total or now - self._printed >= self._interval
        if due:
            self._printed = now
        return due

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return "?"
        return tqdm.format_interval((self._now() - self._began) / done * max(self._total - step, 0))

    def _print(self, parts: list[str]) -> None:
        print("  ".join(parts), file=self._stream, flush=True)
