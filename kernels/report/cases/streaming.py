"""Streaming attention: the dot product, and a score that reads numbers of rows, keys and heads."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.report.case import KernelCase
from kernels.streaming import DotProduct, Mask, streaming_attention


def distance(x, rows, cols, of_rows, of_cols, extras):
    """-gain log(1 + |q - k|^2), from the product and both norms."""
    return -extras[0] * jnp.log(1 + jnp.maximum(of_rows[0] + of_cols[0] - 2 * x, 0))


def _run(score, mask, implementation, q, k, v, *rest):
    values = ((rest[0],), (rest[1],), (rest[2],)) if rest else ((), (), ())
    return streaming_attention(
        score, q, k, v, *values, mask=mask, return_lse=True, implementation=implementation
    )


def _case(T, D, dtype, *words, S=None, H=4, K=None, score=distance, mask=Mask(), **case):  # noqa: B008 (frozen)
    S, K, dtype, array = S or T, K or H, jnp.dtype(dtype), jax.ShapeDtypeStruct
    operands = [array((1, T, H, D), dtype), array((1, S, K, D), dtype), array((1, S, K, D), dtype)]
    if score is distance:
        operands += [array(shape, jnp.float32) for shape in ((1, T, H), (1, S, H), (H,))]
    named = [f"{T=}", f"{S=}" * (S != T), f"{D=} {H=}", f"{K=}" * (K != H), dtype.name]
    kind = "inverse distance" if score is distance else "dot product"
    label = " ".join(word for word in (*named, kind, *words) if word)
    return KernelCase("streaming", label, partial(_run, score, mask), tuple(operands), **case)


CASES = (
    _case(512, 64, "bfloat16", H=2, quick=True),
    _case(4096, 64, "bfloat16"),
    _case(4096, 128, "float32", K=2),
    _case(16384, 128, "bfloat16", score=DotProduct(128**-0.5)),
    _case(2048, 128, "bfloat16", "all keys", S=4096, mask=Mask(causal=False)),
    _case(2047, 64, "float32", "window 256", mask=Mask(window=256)),
    _case(63, 64, "float32", score=DotProduct(0.125)),
)
