"""What scores are made of, and the plainest one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


def product(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [Bq, D] times k [Bk, D] transposed: [Bq, Bk], accumulated in float32 (float64 for float64 operands)."""
    wide = jnp.promote_types(jnp.float32, q.dtype)
    return jnp.matmul(q, k.T, preferred_element_type=wide, precision="highest")


@dataclass(frozen=True)
class DotProduct:
    """scale q.k: softmax attention."""

    scale: float

    def __call__(self, x, rows, cols, of_rows, of_cols, extras):
        return self.scale * x
