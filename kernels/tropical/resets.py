"""Where a scan along the sequence forgets: packed documents and padding, read from a mask.

Letters: B batch, T length.
"""

import jax
import jax.numpy as jnp

from kernels.masks import Mask


def refuse_unscannable(operation: str, mask: Mask) -> None:
    """ValueError for what a causal scan over its own sequence cannot honour."""
    if not mask.causal or mask.window is not None:
        raise ValueError(
            f"{operation} is causal and has no window; got causal={mask.causal}, window={mask.window}, "
            "use tropical_attention for these"
        )
    if mask.lengths is not None or not (isinstance(mask.q_offset, int) and mask.q_offset == 0):
        raise ValueError(
            f"{operation} has one sequence for queries and keys; got q_offset={mask.q_offset}, "
            f"lengths={mask.lengths}: leave both out and carry the state instead"
        )


def documents(mask: Mask, B: int, T: int) -> tuple[jax.Array, jax.Array]:
    """(fresh, real), bool [B, T]: fresh where a token must not see the state before it, real where it is no padding.

    Token 0 goes on from the initial state; left padding hands the state through untouched. Queries and keys are one
    sequence, so kv_segments is read.
    """
    fresh, real = jnp.zeros((B, T), bool), jnp.ones((B, T), bool)
    if mask.starts is not None:
        real &= jnp.arange(T) >= mask.starts[:, None]
    if mask.kv_segments is not None:
        segments = mask.kv_segments
        fresh |= segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), mode="edge") if T > 1 else False
        fresh = fresh.at[:, 0].set(False)
        real &= segments != 0
    return fresh, real
