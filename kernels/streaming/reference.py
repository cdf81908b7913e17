"""Streaming attention written as its definition, dense in T x S: what the fast forms must meet.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K.
"""

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.streaming.arguments import Arguments


def reference(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] in q's dtype and lse [B, T, H] in the accumulation dtype (-inf where no key is visible)."""
    q, k, v = (x.astype(arguments.accumulator) for x in (arguments.q, arguments.k, arguments.v))
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    q = q.reshape(B, T, K, H // K, D)
    extras = jax.tree.map(lambda x: x.reshape(K, H // K, *x.shape[1:]), arguments.extras)
    rows, cols = jnp.arange(T, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32)
    rows = jnp.asarray(arguments.mask.q_offset, jnp.int32) + rows

    def score(q, k, extras):
        return arguments.score(q, k, rows, cols, *extras)

    of_group = jax.vmap(score, in_axes=(1, None, 0))  # over the G query heads that share a key head
    of_heads = jax.vmap(of_group, in_axes=(1, 1, 0))
    s = jax.vmap(of_heads, in_axes=(0, 0, None))(q, k, extras)  # [B, K, G, T, S]
    seen = masks.dense(arguments.mask, T, S)[:, None, None] & (s > -jnp.inf)
    some = seen.any(-1, keepdims=True)
    # Two selects: the inner keeps infinities out of the softmax and its gradient, the outer empties the row.
    s = jnp.where(seen, s, -jnp.inf)
    lse = jax.nn.logsumexp(jnp.where(some, s, 0.0), axis=-1, keepdims=True)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s - lse, 0.0)), 0.0)
    o = jnp.einsum("bkgts,bskd->btkgd", p, v, precision="highest").reshape(B, T, H, -1)
    lse = jnp.where(some, lse, -jnp.inf)[..., 0].reshape(B, H, T).swapaxes(1, 2)
    return o.astype(arguments.q.dtype), lse
