"""What the trainer asks of a task; everything else about the task stays outside this folder.

A step draws data, makes one or more updates of it, and leaves something for the next step. Where data are the
updates, as in pretraining, `OneUpdateAStep` is all that is needed; a task that explores with the parameters before it
learns (a rollout phase) has `updates` of its own.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from attnlab.objectives.objective import Objective
from attnlab.training.feed import Feed

Batch = dict[str, jax.Array]


class Updated(NamedTuple):
    """What an update gave: its scalars, still on the device, and the new parameters."""

    scalars: dict[str, jax.Array]
    params: Any


@dataclass(frozen=True)
class Done:
    """What a step leaves: the task's memory, the tokens it processed, metrics beside those of the updates.

    waited: the task has waited for its updates, so that there is nothing to gain by reading their scalars later.
    """

    memory: Any
    tokens: int
    metrics: dict[str, Any] = field(default_factory=dict)
    waited: bool = False


Updates = Generator[Batch, Updated, Done]


class Task(Protocol):
    """An objective with its data and measurements.

    `batch_size` is B, the rows of a global batch; `cursor_width` is n of the cursors below; `updates_per_step` is the
    number of batches that `updates` yields; `shown` names the metrics in the progress line.
    """

    objective: Objective
    batch_size: int
    cursor_width: int
    updates_per_step: int
    shown: tuple[str, ...]

    def batches(
        self, rows: Sequence[int], cursor: np.ndarray | None
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """Endless (this process's `rows` of each global batch, their cursors after it), going on from `cursor`.

        Arrays lead with len(rows); a cursor is a small int32 array [len(rows), n] from which the stream can go on.
        """
        ...

    def initial_params(self, mesh: jax.sharding.Mesh) -> Any | None:
        """Parameters of another run to begin with, laid out on `mesh`; None: fresh ones."""
        ...

    def init_memory(self, params: Any) -> Any:
        """What the task itself keeps between steps, a tree of arrays saved with the weights; {} for nothing. Pure."""
        ...

    def updates(self, params: Any, memory: Any, feed: Feed, step: int) -> Updates:
        """One step (0-based): yields batches to update with, is sent what each gave, returns what it leaves.

        `params` and `memory` may be used before the first yield; then the trainer has reused the parameters' memory.
        """
        ...

    def evaluate(self, params: Any, mesh: jax.sharding.Mesh) -> dict[str, float]:
        """Held-out measurements by name; every process calls it and gets the same numbers."""
        ...

    def finish(self, params: Any, mesh: jax.sharding.Mesh, workdir: Path) -> list[Path]:
        """Anything worth making once, at the end of training; returns the files written."""
        ...


class OneUpdateAStep:
    """The part of a task whose batches are its updates, and which remembers nothing; needs `tokens_per_batch`."""

    updates_per_step = 1
    shown = ("loss",)
    tokens_per_batch: int

    def init_memory(self, params: Any) -> Any:
        del params
        return {}

    def updates(self, params: Any, memory: Any, feed: Feed, step: int) -> Updates:
        del params, step
        yield feed.place(feed.draw())
        return Done(memory, self.tokens_per_batch)
