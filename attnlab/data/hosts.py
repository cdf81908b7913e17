"""Between the rows that one process builds and the global arrays that all devices see.

Letters: B rows of the global batch, R rows built by this process.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def process_rows(sharding: jax.sharding.Sharding, shape: Sequence[int]) -> tuple[int, ...]:
    """Return, in order, the global rows of an array [B, ..] that this process's devices hold parts of.

    Processes whose devices share rows, as tensor-parallel ones do, each get them: the loader builds equal
    rows there.
    """
    index_of = sharding.addressable_devices_indices_map(tuple(shape))
    return tuple(sorted({row for index in index_of.values() for row in range(*_bounds(index, shape[0]))}))


def to_global(tree: Any, rows: Sequence[int], sharding: jax.sharding.Sharding, batch_size: int) -> Any:
    """Make global arrays [batch_size, ..] from this process's numpy arrays [R, ..].

    tree: one array or a pytree of them, whose row i is global row rows[i].
    Raises ValueError if a device here needs a row that is not in `rows`.
    """
    place = {row: i for i, row in enumerate(rows)}

    def global_array(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            needed = range(*_bounds(index, batch_size))
            if missing := [row for row in needed if row not in place]:
                raise ValueError(
                    f"Devices here need rows {missing} of {sharding}, but only {list(rows)} were built."
                )
            return local[[place[row] for row in needed]][(slice(None), *index[1:])]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return jax.tree.map(global_array, tree)


def local_rows(array: jax.Array, rows: Sequence[int]) -> np.ndarray:
    """Return rows of a global array [B, ..] that this process holds (a restored cursor), as numpy [R, ..].

    Needs each row whole on some device here: shard such arrays over their rows alone, or replicate them.
    """
    held = {}
    for shard in array.addressable_shards:
        if shard.data.shape[1:] != array.shape[1:]:
            raise ValueError(
                f"{array.sharding} divides the inside of rows; shard {array.shape} by rows alone."
            )
        data = np.asarray(shard.data)
        held.update(zip(range(*_bounds(shard.index, array.shape[0])), data, strict=True))
    if missing := [row for row in rows if row not in held]:
        raise ValueError(f"This process holds rows {sorted(held)} of the array, not {missing}.")
    return np.stack([held[row] for row in rows])


def _bounds(index: tuple[slice, ...], size: int) -> tuple[int, int, int]:
    return index[0].indices(size)
