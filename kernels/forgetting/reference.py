"""Forgetting attention written as the paper's equations, dense in T x S: the definition the fast forms must meet.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size; i row, j and l keys.
"""

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting import pruning
from kernels.forgetting.arguments import Arguments


def reference(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] in q's dtype and lse [B, T, H] in the accumulation dtype (-inf where no key is visible)."""
    accumulator, (B, T, H, D), K = arguments.accumulator, arguments.q.shape, arguments.k.shape[2]
    q, k, v = (x.astype(accumulator) for x in (arguments.q, arguments.k, arguments.v))
    s = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, K, H // K, D), k, precision="highest").reshape(
        B, H, T, -1
    )
    s = arguments.scale * s + decay(arguments)
    seen = masks.dense(arguments.mask, T, k.shape[1])[:, None]
    if arguments.threshold is not None:
        sizes = arguments.block_sizes
        seen = seen & pruning.kept_pairs(arguments.acp_start(), T, k.shape[1], sizes.q, sizes.k)
    some = seen.any(-1, keepdims=True)
    # Two selects: the inner keeps infinities out of the softmax and its gradient, the outer empties the row.
    s = jnp.where(seen, s, -jnp.inf)
    lse = jax.nn.logsumexp(jnp.where(some, s, 0.0), axis=-1, keepdims=True)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s - lse, 0.0)), 0.0)
    o = jnp.einsum("bkgts,bskd->btkgd", p.reshape(B, K, H // K, T, -1), v, precision="highest")
    lse = jnp.where(some, lse, -jnp.inf)[..., 0].swapaxes(1, 2)
    return o.reshape(B, T, H, -1).astype(arguments.q.dtype), lse


def decay(arguments: Arguments) -> jax.Array:
    """D_ij = sum of log_f over j < l <= a_i, [B, H, T, S]; 0 without gates."""
    if arguments.log_f is None:
        return jnp.zeros((), arguments.accumulator)
    log_f, T = arguments.log_f.swapaxes(1, 2), arguments.q.shape[1]
    S = log_f.shape[-1]
    positions = arguments.mask.q_offset + jnp.arange(T)
    if arguments.decay_mode == "global":
        c = jnp.cumsum(log_f, axis=-1)
        return jnp.take(c, positions, axis=-1, mode="clip")[..., None] - c[:, :, None, :]
    # A reversed exclusive sum starts at the row itself: near keys, which matter, get small and exact values.
    reached = jnp.where(jnp.arange(S) <= positions[:, None], log_f[:, :, None, :], 0.0)
    from_j = jnp.flip(jnp.cumsum(jnp.flip(reached, -1), axis=-1), -1)
    return jnp.pad(from_j[..., 1:], ((0, 0),) * 3 + ((0, 1),))
