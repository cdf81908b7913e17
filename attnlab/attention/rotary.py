"""Rotary position embedding (RoPE, arXiv 2104.09864) in the half-split layout.

Letters: B batch, T length, H heads, D head size (even); pair i joins channels i and i + D/2.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Turn pair i of every head by the angle position * theta^(-2i/D).

    x [B, T, H, D] with D even; positions [B, T] or [1, T] int32. Angles in float32 at least. Returns x's dtype.
    """
    half = x.shape[-1] // 2
    if x.shape[-1] % 2:
        raise ValueError(
            f"rotary embedding needs an even head size, got {x.shape[-1]}; choose an even head_dim"
        )
    wide = jnp.promote_types(jnp.float32, x.dtype)
    frequency = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle = positions.astype(wide)[..., None, None] * frequency  # [B, T, 1, D/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(wide), x[..., half:].astype(wide)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
