"""The inner loop of every max-plus operation: one slice of the shared axis at a time, first winner kept.

Letters: M rows, N columns, K the axis maximised over; c [..., M, N] running maximum, j its index (-1 while c = -inf).
Nothing of size M x K x N exists: each slice is added and compared while it is in registers. Slices come in increasing
order and only a strictly larger one wins, so the lowest index wins ties.
"""

import jax
import jax.numpy as jnp

UNROLLS = (
    8,
    4,
    2,
)  # slices a turn of the loop, the first that divides the count: about twice as fast as one by one


def fold(count: int, step, carry):
    """carry = step(n, carry) for n = 0 .. count - 1, several steps a turn so that they compile into one pass."""
    unroll = next((u for u in UNROLLS if count % u == 0), 1)

    def turn(i, carry):
        for u in range(unroll):
            carry = step(i * unroll + u, carry)
        return carry

    return jax.lax.fori_loop(0, count // unroll, turn, carry)


def row(x: jax.Array, n) -> jax.Array:
    """x[..., n, :] kept as [..., 1, :]."""
    return jax.lax.dynamic_slice_in_dim(x, n, 1, axis=-2)


def column(x: jax.Array, n) -> jax.Array:
    """x[..., n, :] of a transposed operand as a column [..., :, 1]."""
    return jax.lax.dynamic_index_in_dim(x, n, axis=-2, keepdims=False)[..., None]


def wins(t: jax.Array, c: jax.Array) -> jax.Array:
    """Whether a later candidate t replaces c: strictly larger, or NaN, so that a NaN is never lost."""
    return (t > c) | (t != t)


def nothing(shape: tuple[int, ...], dtype) -> tuple[jax.Array, jax.Array]:
    """(c, j) before any slice: -inf and -1."""
    return jnp.full(shape, -jnp.inf, dtype), jnp.full(shape, -1, jnp.int32)


def product(a_t: jax.Array, b: jax.Array, carry: tuple[jax.Array, jax.Array], offset=0):
    """Fold max_n (a_t[..., n, :, None] + b[..., n, None, :]) into (c, j); slice n counts as index offset + n.

    a_t [..., K, M] is the transposed left operand, b [..., K, N].
    """

    def step(n, carry):
        c, j = carry
        t = column(a_t, n) + row(b, n)
        won = wins(t, c)
        return jnp.where(won, t, c), jnp.where(won, jnp.asarray(offset + n, jnp.int32), j)

    return fold(b.shape[-2], step, carry)


def first_largest(values, count: int, shape: tuple[int, ...], dtype) -> jax.Array:
    """Index n of the first largest values(n), n = 0 .. count - 1, each an array of `shape`; int32.

    One comparison a slice, all of `shape` at a time: several times faster than argmax along a short last axis.
    """

    def step(n, carry):
        largest, at = carry
        t = values(n)
        return jnp.where(t > largest, t, largest), jnp.where(t > largest, jnp.asarray(n, jnp.int32), at)

    return fold(count, step, (jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, jnp.int32)))[1]
