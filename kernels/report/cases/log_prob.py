"""Log-probabilities of tokens at the sizes of language models; N rows, D hidden size, V vocabulary."""

import jax
import jax.numpy as jnp

from kernels.log_prob import token_log_probs
from kernels.report.case import KernelCase


def _case(
    N, D, V, dtype=jnp.bfloat16, vocab_axis=1, weight_dtype=jnp.float32, quick=False, note="", **options
):
    def function(implementation, hidden, weight, labels):
        out = token_log_probs(
            hidden, weight, labels, vocab_axis=vocab_axis, implementation=implementation, **options
        )
        return tuple(x for x in out if x is not None)

    weight = jax.ShapeDtypeStruct((D, V) if vocab_axis else (V, D), weight_dtype)
    operands = (jax.ShapeDtypeStruct((N, D), dtype), weight, jax.ShapeDtypeStruct((N,), jnp.int32))
    label = f"N={N} D={D} V={V} {jnp.dtype(dtype).name}{note}"
    # the forward product, and two recomputed and two of the gradient on TPU (GPU: one recomputed)
    facts = {"FLOPs": 2.0 * N * D * V * 4}
    return KernelCase("log_prob", label, function, operands, quick=quick, facts=facts)


CASES = (
    _case(63, 64, 320, quick=True, return_argmax=True),
    _case(8192, 1024, 50257),
    _case(8192, 1024, 50257, vocab_axis=0, note=" tied"),
    _case(4096, 512, 32000, dtype=jnp.float32, return_entropy=False, return_argmax=True, note=" no entropy"),
    _case(8191, 2048, 32003, weight_dtype=jnp.bfloat16, soft_cap=30.0, temperature=0.7, note=" soft cap"),
    _case(16384, 4096, 128256, weight_dtype=jnp.bfloat16, vocab_axis=0, note=" tied"),
    _case(300, 4096, 50257, dtype=jnp.float32),
    _case(2048, 160, 320, dtype=jnp.float32, return_entropy=False, return_argmax=True, note=" quickstart"),
)
