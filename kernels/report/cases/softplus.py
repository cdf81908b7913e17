"""Softplus attention (LSSA, LSSAR) and its family: the shapes of the report.

Letters: B batch, T tokens, H query heads, K key/value heads, D head size.
"""

import jax
import jax.numpy as jnp

from kernels.report.case import KernelCase
from kernels.softplus import softplus_attention


def _case(
    T: int, D: int, dtype, power: float | None, H: int = 2, K: int = 2, *, quick: bool = False, **options
):
    """One causal call of q [1, T, H, D] and k, v [1, T, K, D]."""

    def function(implementation, q, k, v):
        return softplus_attention(q, k, v, None, power, implementation=implementation, **options)

    name = "bf16" if dtype == jnp.bfloat16 else "f32"
    label = f"{'LSSA' if power is None else f'p={power:g}'} T={T} H={H}/{K} D={D} {name}"
    q, k = (jax.ShapeDtypeStruct((1, T, heads, D), dtype) for heads in (H, K))
    products = 2 + 3 + 4 if power is None else 3 + 4 + 4  # T x T x D: forward, dq, dk and dv
    facts = {"FLOPs": products * H * T * T * D}  # causal: half of the pairs, two operations each
    label += "".join(f" {name}={value}" for name, value in options.items())
    return KernelCase("softplus", label, function, (q, k, k), quick=quick, facts=facts)


CASES = (
    _case(512, 64, jnp.bfloat16, 15.0, quick=True),
    _case(2048, 64, jnp.bfloat16, 15.0),
    _case(2048, 64, jnp.float32, 15.0),
    _case(4096, 128, jnp.bfloat16, 15.0, 8, 2),
    _case(4096, 128, jnp.float32, 15.0),
    _case(16384, 64, jnp.bfloat16, 15.0),
    _case(4096, 64, jnp.bfloat16, None, 8, 8),
    _case(63, 64, jnp.float32, 3),
    _case(2048, 256, jnp.bfloat16, 15.0),
    _case(2048, 64, jnp.bfloat16, 15.0, phi="exp"),
)
