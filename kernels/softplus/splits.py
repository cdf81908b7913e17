"""Decoding over keys that lie in several pieces: sums over one piece, and how the sums of pieces join.

Letters: B batch, T queries, H query heads, K key/value heads, D, Dv head sizes; a weights of stage 1, p power.
LSSA needs one round: partial results (sum a v, sum a) add up. LSSAR needs two: Z = sum a and the largest a of the
whole row fix its threshold, then (sum r^p v, sum r^p) add up. No running maximum is needed in either.

    pieces = [first_sums(q, k_s, v_s, c, visible_s) for each piece s]
    whole = join_first(*pieces)                              o = finish_first(whole)                          LSSA
    parts = [second_sums(q, k_s, v_s, c, visible_s, whole, n) ...]
    o = finish_second(join_second(*parts))                                                                    LSSAR
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.signatures import Array, Bool, Float, checked
from kernels.softplus.arguments import Options
from kernels.softplus.weights import phi, real_power, reciprocal, threshold

STAGE_1 = Options("softplus", 1.0, "l1", None, "zero", 1e-6)


class FirstSums(NamedTuple):
    """values [B, T, H, Dv] = sum a v; Z [B, T, H] = sum a; largest [B, T, H] = max a."""

    values: jax.Array
    Z: jax.Array
    largest: jax.Array


class SecondSums(NamedTuple):
    """values [B, T, H, Dv] = sum r^p v; W [B, T, H] = sum r^p."""

    values: jax.Array
    W: jax.Array


@checked
def first_sums(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    c: Float[Array, "B T H"],
    visible: Bool[Array, "B T S"],
) -> FirstSums:
    """Sums of stage 1 over one piece of the keys; c is the row factor log(D) log(n) of the whole row's n.

    float32 (float64 for float64 operands). Memory [B, H, T, S]: for the few rows of a decoding step.
    """
    a = _weights(q, k, c, visible)
    return FirstSums(_weighted(a, v), a.sum(-1), a.max(-1))


def join_first(*pieces: FirstSums) -> FirstSums:
    """The sums over all pieces."""
    values, Z, largest = zip(*pieces, strict=True)
    return FirstSums(sum(values), sum(Z), jnp.stack(largest).max(0))


def finish_first(whole: FirstSums) -> jax.Array:
    """o [B, T, H, Dv] of LSSA; 0 in rows that see nothing."""
    return whole.values * reciprocal(whole.Z)[..., None]


@checked
def second_sums(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    c: Float[Array, "B T H"],
    visible: Bool[Array, "B T S"],
    whole: FirstSums,
    n: Float[Array, "B T"],
    *,
    power: float = 15.0,
    offset: float = 1.0,
    warm_rows: int = 3,
) -> SecondSums:
    """Sums of stage 2 over one piece of the keys; `whole` and n [B, T] are of the whole row."""
    n = jnp.maximum(n, 1)
    t = (jnp.where(n > warm_rows, offset, 0) / n)[..., None]
    tau, M = threshold(STAGE_1, t, whole.Z, whole.largest, 0)
    a = _weights(q, k, c, visible)
    w = real_power(jnp.maximum(a - tau[..., None], 0) * reciprocal(M)[..., None], power)
    return SecondSums(_weighted(w, v), w.sum(-1))


def join_second(*pieces: SecondSums) -> SecondSums:
    """The sums over all pieces."""
    values, W = zip(*pieces, strict=True)
    return SecondSums(sum(values), sum(W))


def finish_second(whole: SecondSums) -> jax.Array:
    """o [B, T, H, Dv] of LSSAR; 0 in rows that see nothing, and in degenerate ones."""
    return whole.values * reciprocal(whole.W)[..., None]


def _weights(q, k, c, visible):
    """a [B, T, H, S]."""
    wide = jnp.promote_types(jnp.float32, q.dtype)
    B, T, H, D = q.shape
    q, k = q.astype(wide).reshape(B, T, k.shape[2], -1, D), k.astype(wide)
    dot = jnp.einsum("btkgd,bskd->btkgs", q, k, precision="highest").reshape(B, T, H, -1)
    return jnp.where(visible[:, :, None], phi(STAGE_1, c[..., None] * dot)[0], 0)


def _weighted(a, v):
    """Sum over the keys of a [B, T, H, S] times v [B, S, K, Dv]."""
    B, T, H, S = a.shape
    a = a.reshape(B, T, v.shape[2], -1, S)
    o = jnp.einsum("btkgs,bskd->btkgd", a, v.astype(a.dtype), precision="highest")
    return o.reshape(B, T, H, -1)
