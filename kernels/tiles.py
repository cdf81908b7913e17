"""What the Pallas kernels here do with tiles: products, row and column vectors of a block, padding.

On TPU a vector register is 8 rows by 128 lanes. A value per row of a block is kept "wide", [N, 128] with every lane the
same, so that using it beside an [N, M] block moves nothing between lanes; a value per column is a plain [1, M].
"""

import jax
import jax.numpy as jnp

SUBLANES, LANES = 8, 128
LOG2E = 1.4426950408889634  # the hardware's exponential is 2 ** x
LN2 = 0.6931471805599453
MASKED = -1e30  # score of an invisible pair; finite, so that differences of it are not NaN
LOWEST = -1e20  # running maximum before anything was seen: 2 ** (MASKED - LOWEST) = 0


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [N, D] times y [D, M], accumulated in float32; float32 operands at full precision."""
    return _dot(x, y, 0)


def product_transposed(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [N, D] times y [M, D] transposed, likewise."""
    return _dot(x, y, 1)


def _dot(x, y, axis):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, y, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def widen(x: jax.Array, size: int) -> jax.Array:
    """A wide value per row, [N, 128] -> [N, size]."""
    if size <= LANES:
        return x[:, :size]
    return jnp.concatenate([x] * -(-size // LANES), axis=1)[:, :size]


def as_columns(rows: jax.Array) -> list[jax.Array]:
    """[C, N] -> C wide columns [N, 128]. Transposing copies costs less than copying a transposed lane."""
    C, N = rows.shape
    return [jnp.broadcast_to(rows[c : c + 1], (LANES, N)).T for c in range(C)]


def as_row(column: jax.Array) -> jax.Array:
    """Wide [N, 128] -> [1, N]."""
    return column[:, :SUBLANES].T[:1]


def partial_sums(x: jax.Array) -> jax.Array:
    """Sums over the columns of x [N, M] up to the sum over lanes, [N, 128]: no data moves between lanes."""
    N, M = x.shape
    if M % LANES:
        first = jax.lax.broadcasted_iota(jnp.int32, (N, LANES), 1) == 0
        return jnp.where(first, x.sum(1, keepdims=True), 0.0)
    total = x[:, :LANES]
    for n in range(LANES, M, LANES):
        total = total + x[:, n : n + LANES]
    return total


def sums_as_row(partial: jax.Array) -> jax.Array:
    """Finishes `partial_sums`: [N, 128] -> [1, N]."""
    return partial.T.sum(0, keepdims=True)


def pad(x: jax.Array, axis: int, size: int, mode: str = "constant") -> jax.Array:
    """x with `axis` filled up to `size`: with zeros, or mode="edge" with the last entry."""
    if x.shape[axis] == size:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding, mode=mode)


def multiple(size: int, of: int) -> int:
    """The smallest multiple of `of` that is not below `size`."""
    return -(-size // of) * of
