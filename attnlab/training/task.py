"""What the trainer asks of a task; everything else about the task stays outside this folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from attnlab.objectives.objective import Objective


class Task(Protocol):
    """An objective with its data and measurements.

    `batch_size` is B, the rows of a global batch; `tokens_per_batch` counts what throughput is quoted in;
    `cursor_width` is n of the cursors below.
    """

    objective: Objective
    batch_size: int
    tokens_per_batch: int
    cursor_width: int

    def batches(
        self, rows: Sequence[int], cursor: np.ndarray | None
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """Endless (this process's `rows` of each global batch, their cursors after it), going on from `cursor`.

        Arrays lead with len(rows); a cursor is a small int32 array [len(rows), n] from which the stream can go on.
        """
        ...

    def evaluate(self, params: Any, mesh: jax.sharding.Mesh) -> dict[str, float]:
        """Held-out measurements by name; every process calls it and gets the same numbers."""
        ...

    def finish(self, params: Any, mesh: jax.sharding.Mesh, workdir: Path) -> list[Path]:
        """Anything worth making once, at the end of training; returns the files written."""
        ...
