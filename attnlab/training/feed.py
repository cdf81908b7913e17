"""What a step gets its data from, whatever the division of rows among processes.

Letters: B rows of the global batch, R rows built by this process.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab.data.hosts import local_rows, to_global
from attnlab.training.sharding import BATCH
from attnlab.training.throughput import Clock


class Feed:
    """Draws batches, and moves rows between this process (numpy, R rows) and the mesh (arrays of B rows)."""

    def __init__(
        self, batches: Iterator, rows: Sequence[int], cursor, mesh: Mesh, batch_size: int, clock: Clock
    ):
        self._batches, self._clock = batches, clock
        self.rows, self.cursor, self.mesh, self.batch_size = tuple(rows), cursor, mesh, batch_size

    def draw(self) -> dict[str, np.ndarray]:
        """This process's rows of the next global batch; the time is counted as waiting for data."""
        with self._clock.waiting():
            batch, self.cursor = next(self._batches)
        return batch

    @property
    def tokens(self) -> int:
        """Tokens of all steps before this one, over all runs of this training."""
        return self._clock.tokens

    def place(self, tree: Any, spec: PartitionSpec = BATCH) -> Any:
        """Arrays [R, ..] of this process's rows -> global arrays [B, ..], partitioned by `spec`."""
        return to_global(tree, self.rows, NamedSharding(self.mesh, spec), self.batch_size)

    def local(self, tree: Any) -> Any:
        """Global arrays [B, ..] divided over their rows alone -> numpy arrays [R, ..] of this process's rows."""
        return jax.tree.map(lambda array: local_rows(array, self.rows), tree)
