"""Joining results over different keys: what makes keys splittable across calls, devices or cache pieces."""

import jax
import jax.numpy as jnp


def merge(
    o: jax.Array, lse: jax.Array, other_o: jax.Array, other_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of two disjoint sets of keys from the attention over each.

        lse = log(exp(lse_1) + exp(lse_2)),   o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2

    o, other_o [..., Dv] and lse, other_lse [...], as `streaming_attention(return_lse=True)` gives them; rows that saw
    no key (lse = -inf) weigh nothing. Returns o in o's dtype and lse; gradients are finite in every case.
    """
    highest = jax.lax.stop_gradient(jnp.maximum(lse, other_lse))
    highest = jnp.where(highest > -jnp.inf, highest, 0)
    ours, theirs = jnp.exp(lse - highest)[..., None], jnp.exp(other_lse - highest)[..., None]
    Z = ours + theirs
    some = jnp.where(Z > 0, Z, 1)
    merged = (ours * o.astype(lse.dtype) + theirs * other_o.astype(lse.dtype)) / some
    return merged.astype(o.dtype), jnp.where(Z > 0, highest[..., None] + jnp.log(some), -jnp.inf)[..., 0]
