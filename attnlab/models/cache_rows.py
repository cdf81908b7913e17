"""Rows of decode caches, whatever mixers made them: which axis of every array they lie on, repeating and placing them.

Letters: Q prompts, G rows made of each, L positions.

A cache is a plain pytree of a mixer's own design. Its arrays for different numbers of rows tell where the rows are:
their shapes differ there and nowhere else. Arrays that do not differ, such as counters and the caches of auxiliary
streams, are shared by all rows.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from attnlab.models.language_model import LanguageModel
from attnlab.models.placement import BATCH_AXES

Array = jax.Array
SHARED = -1  # in the place of an axis


def row_axes(model: LanguageModel, length: int) -> Any:
    """For every array of a cache of `length` positions the axis of its rows, or SHARED; nothing is computed."""

    def shapes(rows: int):
        starts = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return jax.eval_shape(lambda starts: model.init_cache(rows, length, starts=starts), starts)

    return jax.tree.map(_row_axis, shapes(2), shapes(3))


def _row_axis(two: jax.ShapeDtypeStruct, three: jax.ShapeDtypeStruct) -> int:
    """The axis on which an array for two rows has 2 and one for three rows has 3."""
    axes = [axis for axis, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if not axes:
        return SHARED
    if len(axes) > 1 or (two.shape[axes[0]], three.shape[axes[0]]) != (2, 3):
        raise ValueError(
            f"a cache array has shape {two.shape} for two rows and {three.shape} for three; rows need an axis of "
            "their own to be repeated, so give the mixer's cache one"
        )
    return axes[0]


def repeat_rows(cache: Any, axes: Any, count: int) -> Any:
    """Every row `count` times in succession: row q becomes rows q * count .. q * count + count - 1."""

    def repeat(leaf: Array, axis: int) -> Array:
        return leaf if axis == SHARED else jnp.repeat(leaf, count, axis=axis)

    return cache if count == 1 else jax.tree.map(repeat, cache, axes)


def place_rows(tree: Any, axes: Any = 0) -> Any:
    """The same arrays, their rows over the mesh's data and fsdp axes; `axes` as above, or one number for all.

    Other dimensions stay as the partitioner has them, heads over the tensor axis for instance. Without a mesh, and for
    numbers of rows that the devices do not divide, nothing is said.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def place(leaf: Array, axis: int) -> Array:
        if axis == SHARED or leaf.shape[axis] % shards:
            return leaf
        spec = [PartitionSpec.UNCONSTRAINED] * leaf.ndim
        spec[axis] = BATCH_AXES
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))

    return jax.tree.map(place, tree, jax.tree.map(lambda _: axes, tree) if isinstance(axes, int) else axes)
