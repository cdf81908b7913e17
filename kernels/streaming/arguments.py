"""The canonical form of a call to streaming attention: checked once here, trusted everywhere below.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D, Dk, Dv head sizes of q, k and v.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting.arguments import BlockSizes, static
from kernels.masks import Mask

Score = Callable[..., jax.Array]
"""score(q [Bq, D], k [Bk, Dk], rows [Bq], cols [Bk], *extras of one head) -> [Bq, Bk]; see `streaming_attention`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """What every implementation receives.

    q [B, T, H, D], k [B, S, K, Dk], v [B, S, K, Dv] of one float dtype; extras with leading axis H in the accumulation
    dtype; lengths in `mask` are [B].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    extras: tuple[jax.Array, ...]
    mask: Mask
    score: Score = static()
    block_sizes: BlockSizes = static()

    @property
    def accumulator(self) -> jnp.dtype:
        """float32, or float64 for float64 operands: scores, softmax and accumulators."""
        return jnp.promote_types(jnp.float32, self.q.dtype)


def canonicalize(score, q, k, v, extras, *, mask, block_sizes) -> Arguments:
    """Checks a call and brings it into the one form the implementations share; see the public docstring for errors."""
    (B, T, H, _), (_, S, K, _) = q.shape, k.shape
    if H % K:
        raise ValueError(f"{H=} query heads must be a multiple of the {K=} key/value heads")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(
            f"empty operands q {q.shape}, k {k.shape}, v {v.shape}: every dimension must be at least 1"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share one float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    accumulator = jnp.promote_types(jnp.float32, q.dtype)
    extras = tuple(_extra(n, each, H, accumulator) for n, each in enumerate(extras))
    sizes = block_sizes or BlockSizes.choose(T, S)
    arguments = Arguments(q, k, v, extras, masks.validate(mask, B, T, S), score, sizes)
    _check_score(arguments)
    return arguments


def _extra(n, value, H, accumulator):
    value = jnp.asarray(value)
    if value.ndim == 0 or value.shape[0] != H or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"extras[{n}] is {value.dtype}{list(value.shape)}, expected a float array [{H=}, ...]"
        )
    return value.astype(accumulator)


def _check_score(arguments):
    """Traces the score on one head; nothing is computed."""
    if not isinstance(arguments.score, Hashable):
        raise ValueError(f"score {arguments.score!r} is not hashable; use a function or a frozen dataclass")
    wide = arguments.accumulator
    (_, T, _, D), (_, S, _, Dk) = arguments.q.shape, arguments.k.shape
    shapes = ((T, D), wide), ((S, Dk), wide), ((T,), jnp.int32), ((S,), jnp.int32)
    shapes += tuple((each.shape[1:], wide) for each in arguments.extras)
    got = jax.eval_shape(arguments.score, *(jax.ShapeDtypeStruct(*each) for each in shapes))
    if got.shape != (T, S) or got.dtype != wide:
        raise ValueError(
            f"score {arguments.score} gives {got.dtype}{list(got.shape)} for {T} queries and {S} keys, "
            f"expected {wide.name}{[T, S]}"
        )
