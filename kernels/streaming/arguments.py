"""The canonical form of a call to streaming attention: checked once here, trusted everywhere below.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size of q and k, Dv head size of v.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting.arguments import BlockSizes, static
from kernels.masks import Mask

Score = Callable[..., jax.Array]
"""score(x [Bq, Bk], rows [Bq, 1], cols [1, Bk], of_rows, of_cols, extras) -> [Bq, Bk]; see `streaming_attention`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Values:
    """What a score reads beside the products, in the accumulation dtype, of query heads.

    rows: [B, T, H] each; cols: [B, S, H] each; extras: [H] each.
    """

    rows: tuple[jax.Array, ...] = ()
    cols: tuple[jax.Array, ...] = ()
    extras: tuple[jax.Array, ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """What every implementation receives.

    q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] of one float dtype; lengths in `mask` are [B]; block_sizes as given,
    None leaves them to the implementation.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    values: Values
    mask: Mask
    score: Score = static()
    block_sizes: BlockSizes | None = static()

    @property
    def accumulator(self) -> jnp.dtype:
        """float32, or float64 for float64 operands: products, scores, softmax and accumulators."""
        return jnp.promote_types(jnp.float32, self.q.dtype)


def canonicalize(score, q, k, v, of_rows, of_cols, extras, *, mask, block_sizes) -> Arguments:
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
    values = Values(
        _values("of_rows", of_rows, {"B": B, "T": T, "H": H}, accumulator),
        _values("of_cols", of_cols, {"B": B, "S": S, "H": H}, accumulator),
        _values("extras", extras, {"H": H}, accumulator),
    )
    arguments = Arguments(q, k, v, values, masks.validate(mask, B, T, S), score, block_sizes)
    _check_score(arguments)
    return arguments


def _values(name, values, sizes, accumulator):
    """Values of rows, of keys or of heads, held to their shape and brought to the accumulation dtype."""
    values = tuple(jnp.asarray(each) for each in values)
    for n, each in enumerate(values):
        if each.shape != tuple(sizes.values()) or not jnp.issubdtype(each.dtype, jnp.floating):
            expected = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
            raise ValueError(
                f"{name}[{n}] is {each.dtype}{list(each.shape)}, expected a float array [{expected}]"
            )
    return tuple(each.astype(accumulator) for each in values)


def _check_score(arguments):
    """Traces the score on one head; nothing is computed."""
    if not isinstance(arguments.score, Hashable):
        raise ValueError(f"score {arguments.score!r} is not hashable; use a function or a frozen dataclass")
    T, S, wide, values = arguments.q.shape[1], arguments.k.shape[1], arguments.accumulator, arguments.values

    def of(shape, dtype=wide):
        return jax.ShapeDtypeStruct(shape, dtype)

    of_rows, of_cols = tuple(of((T, 1)) for _ in values.rows), tuple(of((1, S)) for _ in values.cols)
    traced, got = jax.make_jaxpr(arguments.score, return_shape=True)(
        of((T, S)), of((T, 1), jnp.int32), of((1, S), jnp.int32), of_rows, of_cols,
        tuple(of(()) for _ in values.extras),
    )  # fmt: skip
    if traced.consts:
        raise ValueError(
            f"score {arguments.score} closes over {len(traced.consts)} array(s), of shapes "
            f"{[jnp.shape(x) for x in traced.consts]}; pass them in of_rows, of_cols or extras"
        )
    if got.shape != (T, S) or got.dtype != wide:
        raise ValueError(
            f"score {arguments.score} gives {got.dtype}{list(got.shape)} for {T} queries and {S} keys, "
            f"expected {wide.name}{[T, S]}"
        )
