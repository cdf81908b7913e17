"""The canonical form of max-plus linear attention: checked once here, trusted below. Letters: see the package."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.tropical.resets import documents, refuse_unscannable


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """Arrays in the working dtype, float32 or float64; where a token is padding k = -inf and a = 0.

    q [B, T, H, D], k [B, T, K, D], v [B, T, K, Dv], a [B, T, K] finite log-decay, m0 [B, K, D, Dv];
    fresh [B, T] bool: the past is dropped before this token (a = 0 there).
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    a: jax.Array
    m0: jax.Array
    fresh: jax.Array


LAYOUT = Arguments(q="bth.", k="btk.", v="btk.", a="btk", m0="bk..", fresh="bt")
OUT_LAYOUT = ("bth.", "bth.", "bk..")


def canonicalize(q, k, v, log_decay, initial_state, mask) -> tuple[Arguments, jax.Array]:
    """Checks a call; returns the form the implementations share, and which tokens are real [B, T]."""
    (B, T, H, D), K = q.shape, k.shape[2]
    if H % K:
        raise ValueError(f"{H=} query heads must be a multiple of the {K=} key/value heads")
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(
            f"empty operands q {q.shape}, k {k.shape}, v {v.shape}: every dimension must be at least 1"
        )
    refuse_unscannable("maxplus_linear_attention", mask)
    fresh, real = documents(masks.validate(mask, B, T, T), B, T)
    dtype = jnp.promote_types(jnp.float32, jnp.promote_types(q.dtype, jnp.promote_types(k.dtype, v.dtype)))
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    k = jnp.where(real[..., None, None], k, -jnp.inf)
    a = jnp.zeros((B, T, K), dtype) if log_decay is None else log_decay.astype(dtype)
    a = jnp.where((real & ~fresh)[..., None], a, 0)
    m0 = jnp.full((B, K, D, v.shape[3]), -jnp.inf) if initial_state is None else initial_state
    return Arguments(q, k, v, a, m0.astype(dtype), fresh), real
