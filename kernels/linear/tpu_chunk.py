"""What forward and backward of the TPU kernel compute alike in a chunk: weights of pairs, and what decays take.

Letters: C positions of a chunk (a power of two), G query heads that share a state, D channels of q and k, E of v; X is
D or E; a a row, b a key of the chunk; h the size of a half, a power of two below C.

A pair a > b is met in one level of a halving: a in the second and b in the first half of 2h positions. What a channel
loses between them is exp(sum up to a in its half) exp(sum after b in its half): a factor of the row and one of the key,
so that products of vectors with decays are products of matrices, one a level. Exponents are sums of logarithms <= 0.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels import tiles

SUBLANES = 8


@dataclass(frozen=True)
class Plan:
    """What is known when the kernel is traced.

    Attributes:
        chunk, chunks: C, and their number.
        heads: G, query heads of a grid step.
        blocks: steps that share one key/value head.
        parts: 2 with an angle, else 1.
        number, keys, values: a decay of one number a token, of key channels, of value channels.
        documents: rows are packed.
        denominator: sums of weights are wanted.
        interpret: of `pallas_call`.
    """

    chunk: int
    chunks: int
    heads: int
    blocks: int
    parts: int
    number: bool
    keys: bool
    values: bool
    documents: bool
    denominator: bool
    interpret: Any


class Loss(NamedTuple):
    """What the decays of keys or of values leave. at: at each row of what the chunk's start had, [C, X or 1]; to_end:
    at the chunk's end of what each key brought; through: the whole chunk, [1, X or 1]; levels: of pairs, a factor
    [C, X] a level (none for a number)."""

    at: jax.Array
    to_end: jax.Array
    through: jax.Array
    levels: tuple[jax.Array, ...] = ()


class Pairs(NamedTuple):
    """weights [C, C]: of pairs of this chunk, without those of channels; level int32 [C, C]: 0 on the diagonal, n where
    half sizes are 2^(n - 1), -1 for pairs that do not see each other (None without decays of channels)."""

    weights: jax.Array
    level: jax.Array | None


def half_sizes(C: int) -> list[int]:
    return [1 << n for n in range(C.bit_length() - 1)]


def level_table(C: int) -> jax.Array:
    """`Pairs.level` of one document."""
    a, b = jnp.arange(C)[:, None], jnp.arange(C)[None]
    level = sum(((a ^ b) >= h).astype(jnp.int32) for h in half_sizes(C))
    return jnp.where(a >= b, level, -1).astype(jnp.int32)


def grid_of(C: int) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers of a [C, C] tile."""
    return (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))


def make_pairs(plan: Plan, refs: dict, rows: jax.Array | None) -> Pairs:
    """rows: the run of each row, wide [C, 128]."""
    C = plan.chunk
    a, b = grid_of(C)
    seen = a >= b
    if rows is not None:
        seen &= tiles.widen(rows, C) == refs["runs"][0, 0]
    weights = refs["toe"][0] if plan.parts == 2 else jnp.ones((C, C), jnp.float32)
    if plan.number:
        between = jnp.where(a >= b, refs["key_decay"][0, 0, 0], 0.0)  # [a, l]: l <= a
        weights = weights * jnp.exp(tiles.product(between, (a > b).astype(jnp.float32)))  # [l, b]: l > b
    level = jnp.where(seen, refs["level"][...], -1) if plan.keys or plan.values else None
    return Pairs(jnp.where(seen, weights, 0.0), level)


def of_number(log_decay: jax.Array) -> Loss:
    """log_decay [1, C]."""
    a, b = grid_of(log_decay.shape[1])
    at = jnp.where(a >= b, log_decay, 0.0).sum(1, keepdims=True)
    to_end = jnp.where(a < b, log_decay, 0.0).sum(1, keepdims=True)
    return Loss(jnp.exp(at), jnp.exp(to_end), jnp.exp(log_decay.sum(1, keepdims=True)))


def of_channels(log_decay: jax.Array) -> Loss:
    """log_decay [C, X]. Level by level, sums up to a row and after a key grow from halves to whole."""
    C, factors = log_decay.shape[0], []
    up_to, after = log_decay, jnp.zeros_like(log_decay)
    for h in half_sizes(C):
        second = _in_second(log_decay.shape, h)
        factors.append(jnp.exp(jnp.where(second, up_to, after)))
        other = _swapped(up_to + after, h)
        up_to, after = up_to + jnp.where(second, other, 0.0), after + jnp.where(second, 0.0, other)
    return Loss(jnp.exp(up_to), jnp.exp(after), jnp.exp((up_to + after)[:1]), tuple(factors))


def channels_gradient(at: jax.Array, to_end: jax.Array, levels: list[jax.Array]) -> jax.Array:
    """Gradient of log_decay [C, X] from the logarithms' gradients: of `at`, of `to_end`, and of the levels' factors.

    `of_channels` backwards: only sums, so a gradient that no pair moves is exactly 0.
    """
    for h, of_level in reversed(list(zip(half_sizes(at.shape[0]), levels, strict=True))):
        second = _in_second(at.shape, h)
        other = _swapped(jnp.where(second, at, to_end), h)
        at = at + other + jnp.where(second, of_level, 0.0)
        to_end = to_end + other + jnp.where(second, 0.0, of_level)
    return at


def scores(pairs: Pairs, x: jax.Array, y: jax.Array, loss: Loss | None) -> jax.Array:
    """x_a . y_b with the decays of channels, [G, C, C]; x [G, C, X], y [C, X] in the products' dtype."""
    if loss is None or not loss.levels:
        return by_heads(tiles.product_transposed(flat(x), y), x.shape[0])
    total = jnp.where(pairs.level == 0, by_heads(tiles.product_transposed(flat(x), y), x.shape[0]), 0.0)
    for n, factor in enumerate(loss.levels):
        each = tiles.product_transposed(flat(scaled(x, factor)), scaled(y, factor))
        total = jnp.where(pairs.level == n + 1, by_heads(each, x.shape[0]), total)
    return total


def weighted(pairs: Pairs, w: jax.Array, y: jax.Array, loss: Loss | None):
    """sum_b w_ab y_b with the decays of channels, [G, C, X], and the part of each level; w [G, C, C], y [C, X]."""
    if loss is None or not loss.levels:
        return by_heads(tiles.product(flat(w.astype(y.dtype)), y), w.shape[0]), []
    on_diagonal = jnp.where(pairs.level == 0, w, 0.0).astype(y.dtype)
    total, parts = by_heads(tiles.product(flat(on_diagonal), y), w.shape[0]), []
    for n, factor in enumerate(loss.levels):
        of_level = jnp.where(pairs.level == n + 1, w, 0.0).astype(y.dtype)
        parts.append(by_heads(tiles.product(flat(of_level), scaled(y, factor)), w.shape[0]) * factor)
        total = total + parts[-1]
    return total, parts


def weighted_back(pairs: Pairs, w: jax.Array, x: jax.Array, loss: Loss | None):
    """sum_a w_ab x_a over rows of all heads, with the decays of channels, [C, X], and the part of each level."""
    if loss is None or not loss.levels:
        return over_rows(flat(w.astype(x.dtype)), flat(x)), []
    on_diagonal = jnp.where(pairs.level == 0, w, 0.0).astype(x.dtype)
    total, parts = over_rows(flat(on_diagonal), flat(x)), []
    for n, factor in enumerate(loss.levels):
        of_level = jnp.where(pairs.level == n + 1, w, 0.0).astype(x.dtype)
        parts.append(over_rows(flat(of_level), flat(scaled(x, factor))) * factor)
        total = total + parts[-1]
    return total, parts


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x times a float32 factor, in x's dtype."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def over_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [N, D] transposed times y [N, M], accumulated in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, y, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def flat(x: jax.Array) -> jax.Array:
    """[G, C, X] -> [G C, X]."""
    return x.reshape(-1, x.shape[2])


def by_heads(x: jax.Array, G: int) -> jax.Array:
    """[G C, X] -> [G, C, X]."""
    return x.reshape(G, -1, x.shape[1])


def _in_second(shape, h):
    return (lax.broadcasted_iota(jnp.int32, shape, 0) & h) != 0


def _swapped(x, h):
    """Rows a and a ^ h of x [C, X] in each other's place."""
    C, X = x.shape
    if h >= SUBLANES:
        x = x.reshape(C // (2 * h), 2, h, X)
        return jnp.concatenate([x[:, 1:], x[:, :1]], axis=1).reshape(C, X)
    x = x.reshape(-1, min(C, SUBLANES), X)
    down, up = (pltpu.roll(x, shift, 1) for shift in (h, x.shape[1] - h))
    second = (lax.broadcasted_iota(jnp.int32, x.shape, 1) & h) != 0
    return jnp.where(second, down, up).reshape(C, X)
