"""Splitting time over the mesh axis "sequence": the exchanges from which every operation builds its own.

Letters: B batch, T queries, S keys; n the devices along the axis, of which device r holds the r-th shard of the time
steps, [.., T / n, ..]. Functions here run inside `jax.shard_map`, on local shards, unless they say otherwise.

    rows only            queries are split, keys arrive whole: any mask, any implementation
    ring                 key shards travel from device to device, see `rings.py`
    exclusive            a state of constant size is carried over the shards to the left
    from_left            a halo of the steps before a shard

What a room does with them is its `sharded.py`: a tuple of `Exchange`, in order of preference, for `dispatch.over_mesh`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from kernels.masks import Mask


@dataclass(frozen=True)
class Axis:
    """A mesh axis with its size n."""

    name: str
    size: int

    @property
    def index(self) -> jax.Array:
        """r of this device."""
        return lax.axis_index(self.name)


@dataclass(frozen=True)
class Exchange:
    """One way to compute an operation on shards of time.

    Attributes:
        function: (operation, local arguments, Axis) -> local result.
        fits: (whole arguments, n) -> whether it gives the right result for them.
        letters: the time letters of the layout that are split: "t" queries, "s" keys. Others enter whole.
    """

    function: Callable[[Callable, Any, Axis], Any]
    fits: Callable[[Any, int], bool] = lambda arguments, size: True
    letters: str = "ts"


def shift(tree: Any, axis: Axis, by: int = 1) -> Any:
    """What the device `by` places to the left holds (cyclically)."""
    pairs = [(r, (r + by) % axis.size) for r in range(axis.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis.name, pairs), tree)


def from_left(tree: Any, axis: Axis, count: int) -> Any:
    """The `count` time steps (axis 1) before this shard, from as many devices as it takes; zeros before the first."""

    def of_leaf(x):
        length, pieces = x.shape[1], []
        for hop in range(1, -(-count // length) + 1):
            pairs = [(r, r + hop) for r in range(axis.size - hop)]
            pieces.insert(0, lax.ppermute(x[:, max(0, hop * length - count) :], axis.name, pairs))
        return jnp.concatenate(pieces, axis=1)

    return jax.tree.map(of_leaf, tree)


def last(tree: Any, axis: Axis) -> Any:
    """What the last device holds, on every device; float, integer and bool leaves, infinities too."""
    mine = axis.index == axis.size - 1

    def of_last(x):
        wide = x.astype(jnp.int32) if x.dtype == bool else x
        return lax.psum(jnp.where(mine, wide, jnp.zeros_like(wide)), axis.name).astype(x.dtype)

    return jax.tree.map(of_last, tree)


def exclusive(own: Any, initial: Any, combine: Callable[[Any, Any], Any], axis: Axis) -> Any:
    """combine(... combine(combine(initial, own_0), own_1) ..., own_{r-1}): the state that reaches this device.

    `own` says what a shard does to a state, `initial` is the state before the first shard. Every device gathers the n
    summaries, which are small, and folds those to its left.
    """
    gathered = jax.tree.map(lambda x: lax.all_gather(x, axis.name), own)
    index = axis.index

    def step(state, item):
        m, summary = item
        after = combine(state, summary)
        return jax.tree.map(lambda old, new: jnp.where(m < index, new, old), state, after), None

    return lax.scan(step, initial, (jnp.arange(axis.size), gathered))[0]


def last_step(x: jax.Array) -> jax.Array:
    """x [B, T, ...] at its last time step, outside `shard_map`: meshes that track shardings do not cut a split axis."""
    spec = jax.typeof(x).sharding.spec
    if any(axis is not None for axis in spec[1:2]):
        x = jax.reshard(x, PartitionSpec(spec[0], None, *spec[2:]))
    return x[:, -1]


def rows_only(operation: Callable, arguments: Any, axis: Axis) -> Any:
    """Each device computes its query rows over all keys; for arguments with `q` [B, T, ..] and a `mask`."""
    T = arguments.q.shape[1]
    mask = dataclasses.replace(arguments.mask, q_offset=arguments.mask.q_offset + axis.index * T)
    return operation(dataclasses.replace(arguments, mask=mask))


ROWS = Exchange(rows_only, letters="t")


def own_sequence(mask: Mask, T: int, S: int) -> bool:
    """Whether queries and keys are known to be one sequence, shard for shard."""
    return T == S and isinstance(mask.q_offset, int) and mask.q_offset == 0
