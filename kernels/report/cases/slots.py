"""Slot attention: both gated linear attentions and the window, by the kernels of the parts."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.masks import Mask
from kernels.report.case import KernelCase
from kernels.slots import slot_attention


def _run(window, implementation, q, k, v, log_gates, documents=None):
    mask = Mask(q_segments=documents, kv_segments=documents)
    return slot_attention(
        q, k, v, log_gates, window=window, mask=mask, return_state=True, implementation=implementation
    )


def _case(T, D, M, dtype, window=64, H=8, K=8, packed=False, **options):
    dtype, array = jnp.dtype(dtype), jax.ShapeDtypeStruct
    q, k = array((1, T, H, D), dtype), array((1, T, K, D), dtype)
    operands = (q, k, k, array((1, T, K, M), jnp.float32)) + ((array((1, T), jnp.int32),) if packed else ())
    label = f"T={T} D={D} M={M} H={H} K={K} window={window} {dtype.name}" + (" packed" if packed else "")
    return KernelCase("slots", label, partial(_run, window), operands, **options)


CASES = (
    _case(128, 64, 32, "bfloat16", window=0, H=2, K=2, quick=True),
    _case(2048, 64, 64, "bfloat16"),
    _case(4096, 128, 64, "bfloat16", H=8, K=2, packed=True),
    _case(16384, 128, 64, "bfloat16", window=512, H=2, K=2),
    _case(2048, 64, 64, "float32"),
    _case(63, 64, 32, "float32", window=8, H=4, K=2),
)
