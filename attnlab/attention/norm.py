"""Root-mean-square normalisation over the last axis, with one or many weight vectors.

Letters: B batch, T length, H heads, D head size, C channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """y = x * rsqrt(mean(x^2) + eps) * scale over the last axis, computed in float32 (float64 for float64 input).

    x [..., D]; scale broadcastable to x (for example [D], or [H, D] for weights of each head's own).
    Returns x's shape and dtype.
    """
    wide = jnp.promote_types(jnp.float32, x.dtype)
    z = x.astype(wide)
    variance = jnp.mean(jnp.square(z), axis=-1, keepdims=True)
    return (z * jax.lax.rsqrt(variance + eps) * scale.astype(wide)).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm with a learned weight `scale` of shape `shape`, which must match x's last axes."""

    shape: tuple[int, ...]
    eps: float
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, self.shape, self.param_dtype)
        return rms_norm(x, scale, self.eps)
