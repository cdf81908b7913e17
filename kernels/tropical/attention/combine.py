"""Joining the results of attention over disjoint sets of keys: exact, in any order. Letters: see the package."""

import jax
import jax.numpy as jnp


def combine_contexts(
    first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(context, winners) over the union of two disjoint sets of keys (section 3.4); hard scores only.

    Each pair: context [B, T, H, Dv] and winners int32 of the same shape, -1 where the set holds no visible key.
    Winners must be numbered alike in both: add a set's offset to its winners that are not -1, see `shift_winners`.
    The larger context wins, the smaller index among equals; associative, commutative and without rounding.
    """
    (c, j), (c2, j2) = first, second
    later = (c2 > c) | (c2 != c2) | ((c2 == c) & (j2 < j))
    return jnp.where(later, c2, c), jnp.where(later, j2, j)


def shift_winners(winners: jax.Array, offset: int | jax.Array) -> jax.Array:
    """Winners numbered from the first key of their set, renumbered from `offset`; -1 stays. Any shape, int32."""
    return jnp.where(winners < 0, -1, winners + offset).astype(jnp.int32)
