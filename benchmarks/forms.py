"""The operations measured, in three forms each: blockwise, the plain quadratic JAX form, and PyTorch.

A form is a function of operands that returns outputs; the harness differentiates it. Operands are float32 [B, T, H, D].
"""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from attnlab.attention.cosformer import cosformer_attention
from kernels.forgetting import forgetting_attention
from kernels.masks import Mask
from kernels.softplus import softplus_attention
from kernels.tropical.attention import tropical_attention

LSSAR_POWER = 15.0


def operands(operation: str, B: int, T: int, H: int, D: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 operands by name: q, k, v, and log_f for the forget gate (forget probabilities around 0.98)."""
    rng = np.random.default_rng(seed)
    found = {name: rng.normal(size=(B, T, H, D)).astype(np.float32) for name in "qkv"}
    if operation == "lssar":
        found |= {name: found[name] / np.linalg.norm(found[name], axis=-1, keepdims=True) for name in "qk"}
    if operation == "forgetting":
        gate = rng.normal(size=(B, T, H)) + 4
        found["log_f"] = -np.log1p(np.exp(-gate)).astype(np.float32)
    return found


def jax_form(operation: str, implementation: str) -> Callable[..., jax.Array]:
    """function(q, k, v, ...) -> o of a causal operation of this code base."""
    functions = {
        "softmax": forgetting_attention,
        "forgetting": forgetting_attention,
        "cosformer": _cosformer,
        "lssar": partial(softplus_attention, power=LSSAR_POWER),
        "tropical": partial(tropical_attention, mask=Mask()),
    }
    return partial(functions[operation], implementation=implementation)


def _cosformer(q, k, v, implementation):
    return cosformer_attention(q, k, v, max_length=q.shape[1], implementation=implementation)
