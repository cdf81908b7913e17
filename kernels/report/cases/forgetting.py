"""Forgetting attention with and without gates, pruned, packed, windowed, grouped, and decoding."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.forgetting import Mask, forgetting_attention
from kernels.report.case import KernelCase


def _run(gated, packed, options, implementation, q, k, v, *rest):
    """rest: the gates, then the documents, where there are any."""
    rest, options = list(rest), dict(options)
    documents = rest.pop() if packed else None
    mask = Mask(q_segments=documents, kv_segments=documents, **options.pop("mask", {}))
    log_f = rest.pop() if gated else None
    return forgetting_attention(
        q, k, v, log_f, mask=mask, return_lse=True, implementation=implementation, **options
    )


def _case(T, D, dtype, *words, S=None, H=4, K=None, gated=True, packed=False, options=None, **case):
    S, K, dtype, array = S or T, K or H, jnp.dtype(dtype), jax.ShapeDtypeStruct
    operands = [array((1, T, H, D), dtype), array((1, S, K, D), dtype), array((1, S, K, D), dtype)]
    operands += [array((1, S, H), jnp.float32)] * gated + [array((1, T), jnp.int32)] * packed
    named = [
        f"{T=}",
        f"{S=}" * (S != T),
        f"{D=} {H=}",
        f"{K=}" * (K != H),
        dtype.name,
        "no gates" * (not gated),
    ]
    label = " ".join(word for word in (*named, "packed" * packed, *words) if word)
    return KernelCase(
        "forgetting", label, partial(_run, gated, packed, options or {}), tuple(operands), **case
    )


CASES = (
    _case(512, 64, "bfloat16", H=2, quick=True),
    _case(4096, 128, "bfloat16"),
    _case(4096, 128, "float32"),
    _case(4096, 64, "bfloat16", "pruned", options={"acp_threshold": "auto"}),
    _case(16384, 128, "bfloat16", H=8, K=2),
    _case(2048, 64, "float32", H=6, K=2, packed=True),
    _case(4096, 128, "bfloat16", "window 512", gated=False, options={"mask": {"window": 512}}),
    _case(2048, 256, "bfloat16", H=2),
    _case(63, 64, "float32"),
    _case(
        1,
        128,
        "bfloat16",
        "decoding",
        S=16384,
        H=8,
        K=2,
        backward=False,
        options={"mask": {"q_offset": 16383}},
    ),
)
