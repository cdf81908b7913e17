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
    x = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, K, H // K, D), k, precision="highest").reshape(
        B, H, T, S
    )
    s = _scores(arguments, x)
    seen = masks.dense(arguments.mask, T, S)[:, None] & (s > -jnp.inf)
    some = seen.any(-1, keepdims=True)
    # Two selects: the inner keeps infinities out of the softmax and its gradient, the outer empties the row.
    s = jnp.where(seen, s, -jnp.inf)
    lse = jax.nn.logsumexp(jnp.where(some, s, 0.0), axis=-1, keepdims=True)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s - lse, 0.0)), 0.0).reshape(B, K, H // K, T, S)
    o = jnp.einsum("bkgts,bskd->btkgd", p, v, precision="highest").reshape(B, T, H, -1)
    lse = jnp.where(some, lse, -jnp.inf)[..., 0].swapaxes(1, 2)
    return o.astype(arguments.q.dtype), lse


def _scores(arguments, x):
    """s [B, H, T, S] from the products x of the same shape."""
    values = arguments.values
    rows, cols = jnp.arange(x.shape[2], dtype=jnp.int32), jnp.arange(x.shape[3], dtype=jnp.int32)
    rows = (jnp.asarray(arguments.mask.q_offset, jnp.int32) + rows)[:, None]

    def of_head(x, of_rows, of_cols, extras):
        return arguments.score(x, rows, cols[None, :], of_rows, of_cols, extras)

    of_rows = tuple(each.swapaxes(1, 2)[..., :, None] for each in values.rows)
    of_cols = tuple(each.swapaxes(1, 2)[..., None, :] for each in values.cols)
    heads = jax.vmap(of_head)
    return jax.vmap(heads, in_axes=(0, 0, 0, None))(x, of_rows, of_cols, values.extras)
