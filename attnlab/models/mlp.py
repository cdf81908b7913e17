"""The SwiGLU feed-forward layer (arXiv 2002.05202): y = (silu(x W_gate) * (x W_up)) W_down.

Letters: B batch, T length, C channels, I inner width.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


def swiglu_size(hidden_size: int, ratio: float, multiple: int = 256) -> int:
    """I = the next multiple of `multiple` above int(C * ratio * 2/3), the rule of LLaMA and of FoX."""
    return multiple * math.ceil(int(hidden_size * ratio * 2 / 3) / multiple)


class SwiGLU(nn.Module):
    """[B, T, C] -> [B, T, C] with inner width `size`; no biases."""

    size: int
    init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(features, name):
            init = nn.initializers.normal(self.init_std)
            return nn.Dense(
                features,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=init,
                name=name,
            )

        inner = jax.nn.silu(dense(self.size, "gate")(x)) * dense(self.size, "up")(x)
        return dense(x.shape[-1], "down")(inner)
