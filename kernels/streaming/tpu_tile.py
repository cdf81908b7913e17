"""One tile of scores in a TPU kernel, upright [Bq, Bk] (forward, dq) or transposed [Bk, Bq] (dk, dv).

Scores are elementwise, so the same score serves both: what is a column vector in one is a row vector in the other. The
side that stands still while a kernel runs through blocks is made wide once ([N, 128], see `kernels.tiles`); the other
side's vectors are rows, which cost nothing to use. Letters as in `tpu_plan.py`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import tiles
from kernels.streaming.tpu_plan import Plan
from kernels.tiles import LOG2E, MASKED, SUBLANES


class Tile(NamedTuple):
    """Positions, segments and values of a tile, each by broadcasting against it."""

    rows: jax.Array
    cols: jax.Array
    row_segments: jax.Array | None
    col_segments: jax.Array | None
    of_rows: tuple
    of_cols: tuple
    extras: tuple


def column_dtypes(plan: Plan, values: int) -> list:
    """Of the wide columns of the still side: its values, one more that the kernel fills, its segments."""
    return [jnp.float32] * (values + plan.decays) + [jnp.int32] * plan.segmented


def fill_columns(plan: Plan, values, segments, columns) -> None:
    """Makes the values [C, N] and segments [1, N] of a block wide, 128 rows at a time: more would not fit registers."""
    for at in lanes(columns[0].shape[0] if columns else 0):
        if values is not None:
            for column, value in zip(columns, tiles.as_columns(values[:, at]), strict=False):
                column[at] = value
        if plan.segmented:
            columns[-1][at] = tiles.as_columns(segments[:, at])[0]


def lanes(size: int) -> list:
    """Slices of 128 that cover `size`."""
    return [slice(first, min(first + tiles.LANES, size)) for first in range(0, size, tiles.LANES)]


def upright(plan: Plan, offset, m, n, of_cols, extras, col_segments, columns) -> Tile:
    """The tile of query block m and key block n; `columns` are those of the query block."""
    Bq, Bk = plan.sizes.q, plan.sizes.k
    rows = offset + m * Bq + jax.lax.broadcasted_iota(jnp.int32, (Bq, 1), 0)
    cols = n * Bk + jax.lax.broadcasted_iota(jnp.int32, (1, Bk), 1)
    values, segments = _columns(plan, columns, Bk)
    return Tile(rows, cols, segments, col_segments, values, _rows(of_cols), _scalars(extras))


def transposed(plan: Plan, offset, m, first, size, of_rows, extras, row_segments, columns) -> Tile:
    """The same transposed, of query block m and `size` keys from `first` on; `columns` are those of the keys."""
    Bq = plan.sizes.q
    rows = offset + m * Bq + jax.lax.broadcasted_iota(jnp.int32, (1, Bq), 1)
    cols = first + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    values, segments = _columns(plan, columns, Bq)
    return Tile(rows, cols, row_segments, segments, _rows(of_rows), values, _scalars(extras))


def scores(plan: Plan, x, tile: Tile, limits, b, masked: bool):
    """X of a tile of products x in units of log 2, and pull(dS) -> gradients of x, of_rows, of_cols and extras.

    A score that is linear in x needs no pull.
    """

    if plan.linear is not None:
        X, pull = x * (plan.linear * LOG2E), None
        if plan.decays:
            X = (X + (tile.of_rows[0] - tile.of_cols[0])) + (tile.of_rows[1] - tile.of_cols[1])
    else:
        s, pull = jax.vjp(partial(_score, plan, tile), x, tile.of_rows, tile.of_cols, tile.extras)
        X = jnp.maximum(s * LOG2E, MASKED)  # a score may hide pairs by -inf
    return (jnp.where(visible(plan, tile, limits, b), X, MASKED) if masked else X), pull


def visible(plan: Plan, tile: Tile, limits, b) -> jax.Array:
    """Visibility by broadcasting."""
    rows, cols = tile.rows, tile.cols
    seen = (cols >= limits[2 * b]) & (cols < limits[2 * b + 1])
    if plan.causal:
        seen &= cols <= rows
    if plan.window is not None:
        seen &= rows - cols < plan.window
    if plan.segmented:
        seen &= (tile.row_segments == tile.col_segments) & (tile.row_segments != 0)
    return seen


def sums_by_sublane(x: jax.Array) -> jax.Array:
    """Sums over the rows of x [N, M] up to the sum over sublanes, [8, M]; the last rows of 128 first."""
    N, M = x.shape
    if N % SUBLANES:
        first = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, M), 0) == 0
        return jnp.where(first, x.sum(0, keepdims=True), 0.0)
    total = None
    for at in lanes(N):
        part = x[at.stop - SUBLANES : at.stop]
        for end in range(at.stop - SUBLANES, at.start, -SUBLANES):
            part = part + x[end - SUBLANES : end]
        total = part if total is None else total + part
    return total


def _score(plan, tile, x, of_rows, of_cols, extras):
    return plan.score(x, tile.rows, tile.cols, of_rows, of_cols, extras)


def _columns(plan, columns, size):
    """Values as [N, 1] for the score, or as wide as the tile for a decay; and segments likewise wide."""
    values = columns[: len(columns) - plan.decays - plan.segmented]
    values = tuple(tiles.widen(each[...], size) if plan.decays else each[:, :1] for each in values)
    return values, tiles.widen(columns[-1][...], size) if plan.segmented else None


def _rows(values):
    return () if values is None else tuple(values[n : n + 1] for n in range(values.shape[0]))


def _scalars(extras):
    """[E, 128] -> [1, 1] each."""
    return () if extras is None else tuple(extras[n : n + 1, :1] for n in range(extras.shape[0]))
