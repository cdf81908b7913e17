"""Adaptive computation pruning (arXiv 2504.06949): key blocks whose decay proves their weight negligible are skipped.

If U bounds |scale q_i.k_j| for a head, keys with D_ij < delta carry at most S e^(2U + delta) of a row's weight. Within
tolerance ln eps this gives delta = -(2U + ln S) + ln eps. D is largest between the first row of query block m and the
last key of key block n, so the block is pruned iff gap_mn < delta: a boundary that only moves forward with m.

Letters: B batch, T queries, S keys, H heads, nq query blocks, nk key blocks.
"""

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting import decay
from kernels.masks import Mask


def acp_delta(
    requested: float | str | jax.Array, q: jax.Array, k: jax.Array, *, scale: float, tolerance: float = -10.0
) -> jax.Array:
    """delta [B, H], at most 0 (a positive one could drop the diagonal) and without gradient.

    "auto" takes U = max_t |q_t| max_t |k_t| scale per batch row and head; a number or array broadcastable to [B, H] is
    used as it is. Raises ValueError for another string, a tolerance above 0, or a shape that does not broadcast.
    """
    q, k = jnp.asarray(q), jnp.asarray(k)
    B, _, H, _ = q.shape
    if isinstance(requested, str):
        if requested != "auto":
            raise ValueError(
                f'acp_threshold={requested!r} is unknown; use None, a number, an array or "auto"'
            )
        return _automatic(q, k, scale, tolerance)
    delta = jnp.asarray(requested, jnp.promote_types(jnp.float32, q.dtype))
    try:
        delta = jnp.broadcast_to(delta, (B, H))
    except ValueError:
        raise ValueError(
            f"acp_threshold of shape {delta.shape} does not broadcast to [B, H] = {(B, H)}"
        ) from None
    return jax.lax.stop_gradient(jnp.minimum(delta, 0.0))


def acp_start(log_f: jax.Array, delta: jax.Array, q_offset, T: int, block_q: int, block_k: int) -> jax.Array:
    """First key block that query block m keeps, int32 [B, H, nq]; from log_f [B, S, H] and delta [B, H].

    A delta of every row, [B, H, T], is read at the first row of each block (keys in pieces lie below different ones).
    Padded keys must have log_f = 0. The sums are chunk-local, so the test is exact at any position.
    """
    tops = q_offset + jnp.arange(0, T, block_q)
    gap = decay.gaps(jax.lax.stop_gradient(log_f).swapaxes(1, 2), tops, block_k)
    delta = delta[:, :, None] if delta.ndim == 2 else delta[:, :, ::block_q]
    start = (gap < delta[..., None]).sum(-1).astype(jnp.int32)
    return jax.lax.cummax(start, axis=2)


def acp_end(start: jax.Array, num_key_blocks: int) -> jax.Array:
    """First query block that no longer keeps key block n, int32 [B, H, nk] from acp_start: the same set of blocks."""
    return (start[:, :, None, :] <= jnp.arange(num_key_blocks)[:, None]).sum(-1).astype(jnp.int32)


def kept_blocks(start: jax.Array, num_key_blocks: int) -> jax.Array:
    """bool [B, H, nq, nk]: block (m, n) is not pruned."""
    return jnp.arange(num_key_blocks) >= start[..., None]


def kept_pairs(start: jax.Array, T: int, S: int, block_q: int, block_k: int) -> jax.Array:
    """bool [B, H, T, S]: the pair lies in a block that is not pruned (for the dense reference)."""
    return jnp.arange(S) // block_k >= start[:, :, jnp.arange(T) // block_q, None]


def acp_visited_fraction(
    start: jax.Array, mask: Mask, T: int, S: int, block_q: int, block_k: int
) -> jax.Array:
    """Blocks computed over blocks the mask alone would compute, per batch row and head: float32 [B, H]."""
    allowed = masks.visible_blocks(mask, T, S, block_q, block_k)[:, None]
    visited = (allowed & kept_blocks(start, allowed.shape[-1])).sum((-2, -1))
    return visited.astype(jnp.float32) / jnp.maximum(allowed.sum((-2, -1)), 1)


def _automatic(q, k, scale, tolerance):
    """-(2U + ln S) + ln eps, [B, H]; `tolerance` is ln eps."""
    if tolerance > 0:
        raise ValueError(
            f"log_pruning_tolerance={tolerance} must be at most 0: it is the log of the weight given up"
        )
    accumulator = jnp.promote_types(jnp.float32, q.dtype)
    q_norm, k_norm = (jnp.linalg.norm(x.astype(accumulator), axis=-1).max(axis=1) for x in (q, k))
    bound = abs(scale) * q_norm * jnp.repeat(k_norm, q.shape[2] // k.shape[2], axis=1)
    return jax.lax.stop_gradient(-(2 * bound + jnp.log(jnp.asarray(k.shape[1], accumulator))) + tolerance)
