"""Prefix softmax: heads of many value channels (the non-approximate kind), and a head a channel (AFT-simple)."""

import jax
import jax.numpy as jnp

from kernels.masks import Mask
from kernels.prefix_softmax import prefix_softmax
from kernels.report.case import KernelCase


def _run(implementation, s, v, documents=None):
    mask = Mask(q_segments=documents, kv_segments=documents)
    return prefix_softmax(s, v, mask=mask, return_lse=True, return_state=True, implementation=implementation)


def _case(S, H, K, Dv, dtype, packed=False, **options):
    dtype, array = jnp.dtype(dtype), jax.ShapeDtypeStruct
    operands = (array((1, S, H), jnp.float32), array((1, S, K, Dv), dtype))
    operands += (array((1, S), jnp.int32),) if packed else ()
    label = f"S={S} H={H} K={K} Dv={Dv} {dtype.name}" + (" packed" if packed else "")
    return KernelCase("prefix_softmax", label, _run, operands, **options)


CASES = (
    _case(256, 2, 2, 64, "bfloat16", quick=True),
    _case(4096, 8, 8, 64, "bfloat16"),
    _case(4096, 8, 2, 128, "bfloat16", packed=True),
    _case(16384, 2, 2, 128, "bfloat16"),
    _case(2048, 8, 8, 64, "float32"),
    _case(63, 4, 2, 64, "float32", packed=True),
    _case(4096, 1024, 1024, 1, "bfloat16"),
    _case(2047, 768, 768, 1, "float32", packed=True),
)
