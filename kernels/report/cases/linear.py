"""Linear attention: the cosine of distance, decays of one number, of key channels and of value channels."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.linear import Mask, linear_attention
from kernels.report.case import KernelCase

DECAYS = {"number": "log_key_decay", "keys": "log_key_decay", "values": "log_value_decay"}


def _run(decay, angle, packed, implementation, q, k, v, *rest):
    """Numerator, denominator and state; rest: the decay, then the documents, where there are any."""
    rest = list(rest)
    documents = rest.pop() if packed else None
    options = {DECAYS[decay]: rest.pop()} if decay else {}
    return linear_attention(
        q, k, v, mask=Mask(q_segments=documents, kv_segments=documents), angle=angle, return_state=True,
        denominator=decay != "values", implementation=implementation, **options,
    )  # fmt: skip


def _case(T, D, dtype, H=8, K=8, decay=None, angle=0.0, packed=False, **options):
    dtype = jnp.dtype(dtype)
    array = jax.ShapeDtypeStruct
    operands = [array((1, T, H, D), dtype), array((1, T, K, D), dtype), array((1, T, K, D), dtype)]
    if decay:
        operands.append(array((1, T, K) if decay == "number" else (1, T, K, D), jnp.float32))
    if packed:
        operands.append(array((1, T), jnp.int32))
    words = ["cosine" if angle else "", f"decay of {decay}" if decay else "", "packed" if packed else ""]
    label = " ".join(w for w in (f"T={T} D={D} H={H} K={K} {dtype.name}", *words) if w)
    return KernelCase("linear", label, partial(_run, decay, angle, packed), tuple(operands), **options)


CASES = (
    _case(256, 64, "bfloat16", H=2, K=2, decay="number", quick=True),
    _case(4096, 64, "bfloat16", angle=4e-4),
    _case(4096, 64, "float32", angle=4e-4),
    _case(4096, 128, "bfloat16", K=2, angle=4e-4, packed=True),
    _case(16384, 128, "bfloat16", decay="number"),
    _case(63, 64, "float32", decay="number", angle=4e-4),
    _case(4096, 64, "bfloat16", decay="keys"),
    _case(4096, 128, "float32", K=2, decay="keys"),
    _case(4096, 64, "bfloat16", decay="values"),
    _case(2047, 64, "float32", decay="values", packed=True),
)
