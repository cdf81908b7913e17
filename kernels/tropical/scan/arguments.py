"""The canonical form of a max-plus scan. Letters: see the package."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.tropical.resets import documents, refuse_unscannable


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """a, b [B, T, ...] and h0 [B, ...] in the working dtype, with a = -inf where the past is dropped."""

    a: jax.Array
    b: jax.Array
    h0: jax.Array


def canonicalize(a, b, h0, mask) -> tuple[Arguments, jax.Array]:
    """Checks a call; returns the form the implementations share, and which tokens are real [B, T]."""
    B, T = a.shape[:2]
    if 0 in a.shape:
        raise ValueError(f"empty operand a {a.shape}: every dimension must be at least 1")
    refuse_unscannable("maxplus_scan", mask)
    fresh, real = documents(masks.validate(mask, B, T, T), B, T)
    dtype = jnp.promote_types(jnp.float32, jnp.promote_types(a.dtype, b.dtype))
    h0 = jnp.full((B, *a.shape[2:]), -jnp.inf) if h0 is None else h0

    def wide(x):
        return x.reshape(x.shape + (1,) * (a.ndim - 2))

    a = jnp.where(wide(fresh), -jnp.inf, jnp.where(wide(real), a.astype(dtype), 0))
    return Arguments(a, jnp.where(wide(real), b.astype(dtype), -jnp.inf), h0.astype(dtype)), real
