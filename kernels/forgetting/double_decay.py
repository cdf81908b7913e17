"""Cumulative sums of log gates as pairs of floats, so that a difference of any two is as good as a sum in between.

c_j = sum of log_f_l over l <= j is kept as hi_j + lo_j (hi the nearest float, lo what is left), about 48 bits together.

    D_ij = c_{a_i} - c_j = (hi_{a_i} - hi_j) + (lo_{a_i} - lo_j)

The difference of near values hi is exact and that of far ones is rounded once, relative to D_ij itself, so the error
does not grow with |c|: kernels need no decay chunks. Letters: B batch, H heads, S keys.
"""

import jax
import jax.numpy as jnp

CHUNK = 128


def double_sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inclusive cumulative sums of x [..., N] along the last axis as (hi, lo), each [..., N] in x's dtype.

    The difference of two of them taken as above is within a few roundings of the sum in between, relative to that sum.
    """
    N = x.shape[-1]
    chunks = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -N % CHUNK)]).reshape(*x.shape[:-1], -1, CHUNK)
    hi, lo = _sums(chunks, jnp.zeros_like(chunks))
    if chunks.shape[-2] > 1:
        hi, lo = add((hi, lo), _before(hi[..., -1], lo[..., -1]))
    return hi.reshape(*x.shape[:-1], -1)[..., :N], lo.reshape(*x.shape[:-1], -1)[..., :N]


def add(x: tuple, y: tuple) -> tuple[jax.Array, jax.Array]:
    """The sum of two pairs (hi, lo) as such a pair."""
    hi = x[0] + y[0]
    part = hi - x[0]
    lost = (x[0] - (hi - part)) + (y[0] - part)  # exactly what the rounding of hi left out
    lost = lost + (x[1] + y[1])
    whole = hi + lost
    return whole, lost - (whole - hi)


def _sums(hi, lo):
    """Cumulative sums of pairs along the last axis: each step adds what stands 1, 2, 4, ... places before."""
    step = 1
    while step < hi.shape[-1]:
        hi, lo = add((hi, lo), (_shift(hi, step), _shift(lo, step)))
        step *= 2
    return hi, lo


def _before(hi, lo):
    """The sum of all chunks before each, [..., chunks, 1], from the sums of each."""
    hi, lo = _sums(hi, lo)
    return _shift(hi, 1)[..., None], _shift(lo, 1)[..., None]


def _shift(x, step):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(step, 0)])[..., : x.shape[-1]]
