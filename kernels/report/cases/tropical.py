"""The max-plus operations. Letters: see `kernels.tropical`; M, K, N of the matrix product, C channels of the scan."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import tropical
from kernels.masks import Mask
from kernels.report.case import KernelCase


def _attention(implementation, q, k, v, *, score, window):
    return tropical.tropical_attention(
        q, k, v, score=score, mask=Mask(window=window), return_winners=True, implementation=implementation
    )


def _attention_case(T, H, D, dtype=jnp.float32, *, K=None, score="hilbert", window=None, quick=False):
    K = K or H
    shapes = [jax.ShapeDtypeStruct((1, T, heads, D), dtype) for heads in (H, K, K)]
    label = f"{score} T={T} H={H}/{K} D={D} {jnp.dtype(dtype).name}" + (f" window={window}" if window else "")
    pairs = H * T * (T + 1) // 2 if window is None else H * T * window
    return KernelCase(
        "tropical attention", label, partial(_attention, score=score, window=window), tuple(shapes), quick=quick,
        facts={"VPU operations forward": pairs * 7 * D},
    )  # fmt: skip


def _matmul_case(M, K, N, dtype=jnp.float32, *, P=1, winners=True, quick=False):
    def function(implementation, a, b):
        return tropical.maxplus_matmul(a, b, return_winners=winners, implementation=implementation)

    shapes = jax.ShapeDtypeStruct((P, M, K), dtype), jax.ShapeDtypeStruct((P, K, N), dtype)
    label = f"{P} x {M} x {K} x {N} {jnp.dtype(dtype).name}" + ("" if winners else " values only")
    facts = {"VPU operations forward": P * M * N * K * (4 if winners else 2)}
    return KernelCase("max-plus product", label, function, shapes, quick=quick, backward=winners, facts=facts)


def _scan(implementation, a, b, h0):
    return tropical.maxplus_scan(
        a, b, h0, return_state=True, return_carry_wins=True, implementation=implementation
    )


def _scan_case(T, C, dtype=jnp.float32, *, B=1, quick=False):
    shapes = jax.ShapeDtypeStruct((B, T, C), dtype), jax.ShapeDtypeStruct((B, T, C), dtype)
    label = f"B={B} T={T} C={C} {jnp.dtype(dtype).name}"
    shapes = (*shapes, jax.ShapeDtypeStruct((B, C), jnp.float32))
    return KernelCase(
        "max-plus scan", label, _scan, shapes, quick=quick, facts={"bytes forward": 12 * B * T * C}
    )


def _linear(implementation, q, k, v, log_decay, state):
    return tropical.maxplus_linear_attention(
        q, k, v, log_decay, initial_state=state, return_state=True, implementation=implementation
    )


def _linear_case(T, H, D, dtype=jnp.float32, *, K=None, quick=False):
    K = K or H
    shapes = [jax.ShapeDtypeStruct((1, T, heads, D), dtype) for heads in (H, K, K)]
    shapes += [jax.ShapeDtypeStruct((1, T, K), jnp.float32), jax.ShapeDtypeStruct((1, K, D, D), jnp.float32)]
    label = f"T={T} H={H}/{K} D={D} {jnp.dtype(dtype).name}"
    facts = {"VPU operations forward": T * D * D * (5 * K + 5 * H)}
    return KernelCase("max-plus linear attention", label, _linear, tuple(shapes), quick=quick, facts=facts)


CASES = (
    _attention_case(128, 1, 8, quick=True),
    _attention_case(2048, 4, 64),
    _attention_case(4096, 2, 128),
    _attention_case(4096, 4, 64, jnp.bfloat16, K=2),
    _attention_case(16384, 2, 64, window=1024),
    _attention_case(63, 2, 64),
    _attention_case(2048, 2, 64, score="hilbert_asym"),
    _attention_case(2048, 2, 64, score="maxplus_dot"),
    _matmul_case(128, 64, 128, quick=True),
    _matmul_case(2048, 2048, 2048),
    _matmul_case(2048, 2048, 2048, winners=False),
    _matmul_case(4096, 128, 128, jnp.bfloat16, P=4),
    _matmul_case(63, 65, 67),
    _scan_case(256, 128, quick=True),
    _scan_case(4096, 1024, B=8),
    _scan_case(16384, 768, jnp.bfloat16),
    _scan_case(63, 100),
    _linear_case(256, 2, 16, quick=True),
    _linear_case(4096, 8, 64),
    _linear_case(4096, 8, 64, jnp.bfloat16, K=2),
    _linear_case(16384, 4, 128),
    _linear_case(63, 2, 64),
)
