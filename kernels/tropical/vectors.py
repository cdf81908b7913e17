"""Parts of the max-plus TPU kernels: loops over slices whose operands are spread over whole vector registers.

Letters: R rows of a tile held in registers at once (sublanes), L its columns (lanes). A row of one operand is read for
all R sublanes at once; a column of the other is spread over all L lanes, once for L / 128 registers. Columns must be
known when the kernel is compiled, rows need not.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

ROWS = 16  # R: with L = 512 a tile is eight registers of the 64


def why_not_float32(dtype) -> str | None:
    """A sentence for float64, which no kernel has."""
    if dtype == jnp.float32:
        return None
    return f"the kernel computes in float32 and an operand is {dtype}; cast it or take implementation='blockwise'"


def why_not_hard(beta) -> str | None:
    """A sentence for smooth maxima, which have no winners to come back to."""
    if beta is None:
        return None
    return "smooth maxima (smooth_beta or lse_dot) are another algorithm; take implementation='blockwise' for them"


def pad(x: jax.Array, axis: int, multiple: int, fill: float = 0) -> jax.Array:
    """Fill up one axis to a multiple."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding, constant_values=fill)


def in_groups(count: int, body, most: int = ROWS) -> None:
    """body(rows) for consecutive groups of `most` rows, or fewer so that they divide the count (8 must)."""
    size = next(size for size in (most, 16, 8) if size <= most and count % size == 0)

    def turn(n, _):
        body(pl.ds(pl.multiple_of(n * size, size), size))
        return 0

    jax.lax.fori_loop(0, count // size, turn, 0)


def rows_of(ref):
    """The rows [1, L] of a tile one after the other, read eight at a time: one load for them all."""
    for top in range(0, ref.shape[0], 8):
        eight = ref[top : min(top + 8, ref.shape[0]), :]
        for n in range(eight.shape[0]):
            yield eight[n : n + 1, :]


def scores(score: str, x_ref, y: jax.Array, flip: bool = False) -> jax.Array:
    """Raw scores [R, L] of x_ref [D, L] (queries) and y [R, D] (keys); flip: x_ref holds the keys and y the queries."""
    D, shape = x_ref.shape[0], (y.shape[0], x_ref.shape[1])
    low, high = jnp.full(shape, jnp.inf, y.dtype), jnp.full(shape, -jnp.inf, y.dtype)
    for d, x in enumerate(rows_of(x_ref)):
        of_y = y[:, d : d + 1]
        if score == "maxplus_dot":
            high = jnp.maximum(high, x + of_y)
            continue
        t = of_y - x if flip else x - of_y
        low, high = jnp.minimum(low, t), high if score == "hilbert_asym" else jnp.maximum(high, t)
    if score == "maxplus_dot":
        return high
    if score == "hilbert":
        return low - high
    return D * low - (x_ref[...].sum(0, keepdims=True) - y.sum(1, keepdims=True))  # hilbert_asym


def first_max(a_ref, b_ref, c_ref, j_ref, rows, offset) -> None:
    """Fold max_n (a[rows, n] + b[n, :]) into c, j [rows, L]; slice n is index offset + n; j_ref may be None."""
    a, c = a_ref[rows, :], c_ref[rows, :]
    j = None if j_ref is None else j_ref[rows, :]
    for n, b in enumerate(rows_of(b_ref)):
        t = a[:, n : n + 1] + b
        if j is not None:
            j = jnp.where(t > c, offset + n, j)
        c = jnp.maximum(c, t)
    c_ref[rows, :] = c
    if j is not None:
        j_ref[rows, :] = j
