"""Between channels and heads: splitting, merging, and the norm of queries and keys.

Letters: B batch, T length, H heads, D head size, C = H*D channels, head-major.
"""

import jax

from attnlab.attention.norm import RMSNorm

Array = jax.Array


def split_heads(x: Array, num_heads: int) -> Array:
    """[B, T, H*D] -> [B, T, H, D]."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def merge_heads(x: Array) -> Array:
    """[B, T, H, D] -> [B, T, H*D]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def head_norm(num_heads: int, head_dim: int, eps: float, shared: bool, param_dtype, name: str) -> RMSNorm:
    """RMS norm of each head over D, with a weight per head and channel [H, D], or one [D] shared by all heads."""
    shape = (head_dim,) if shared else (num_heads, head_dim)
    return RMSNorm(shape, eps, param_dtype, name=name)
