"""Sums over scored tokens, which nothing at the other places can reach: neither a value nor a gradient, NaN included.

Letters: Q prompts, G completions of each, N completion length.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def wide(x: Array) -> Array:
    """x in at least float32; float64 stays. Integers and booleans become JAX's default float."""
    dtype = jnp.result_type(x)
    floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.asarray(x, jnp.promote_types(jnp.float32, dtype if floating else jnp.result_type(float)))


def zeroed(x: Array, mask: Array) -> Array:
    """x where the mask is True, else 0. Taken before anything nonlinear, it keeps NaN out of gradients too."""
    return jnp.where(mask, wide(x), 0)


def per_token(x: Array) -> Array:
    """A number a completion [Q, G] as [Q, G, 1]; numbers of tokens [Q, G, N] as they are."""
    return x[..., None] if x.ndim == 2 else x


def row_mean(x: Array, mask: Array) -> Array:
    """Mean over the scored tokens of each completion, [Q, G, N] -> [Q, G]; 0 where there are none."""
    return zeroed(x, mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def pooled_mean(x: Array, mask: Array) -> Array:
    """Mean over everything the mask holds, a scalar; 0 where it holds nothing."""
    return zeroed(x, mask).sum() / jnp.maximum(mask.sum(), 1)
