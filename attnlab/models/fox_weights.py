"""Weights of the published Forgetting Transformers (zhixuan-lin/forgetting-transformer) under attnlab's names.

A published linear weight is [out, in], so kernels are transposes. Norm weights of heads come as [H*D], head-major, or
as one [D] shared by all heads. The SiLU half of `mlp.gate_proj` is its first I rows. Weights are NumPy or JAX arrays.

Letters: C channels, H heads, D head size, I MLP width, V vocabulary, L layers.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.forgetting import ForgettingConfig
from attnlab.models.config import ModelConfig

Weights = Mapping[str, np.ndarray]

# published name (a shifted projection calls its matrix `linear`) -> ours
KERNELS = {
    "q_proj.weight": "query/kernel",
    "k_proj.weight": "key/kernel",
    "k_proj.linear.weight": "key/kernel",
    "k_proj.shift_proj.weight": "key_shift/kernel",
    "v_proj.weight": "value/kernel",
    "v_proj.linear.weight": "value/kernel",
    "v_proj.shift_proj.weight": "value_shift/kernel",
    "fgate_proj.weight": "forget_gate/kernel",
    "ogate_proj.weight": "output_gate/kernel",
    "o_proj.weight": "out/kernel",
}
VECTORS = {"fgate_proj.bias": "forget_gate/bias", "fgate_bias": "forget_gate_bias"}
HEAD_NORMS = {
    "q_norm.weight": "query_norm/scale",
    "k_norm.weight": "key_norm/scale",
    "output_norm.weight": "output_norm/scale",
}


def attention_params(weights: Weights, config: ForgettingConfig) -> dict[str, Any]:
    """Parameters of a `ForgettingAttention` from the names below a published layer's `attn.`.

    Constants of fixed gates are left out: the module computes them. ValueError for a name that is not known.
    """
    params: dict[str, Any] = {}
    for name, value in weights.items():
        if name in KERNELS:
            _put(params, KERNELS[name], value.T)
        elif name in VECTORS:
            if not (name == "fgate_bias" and config.gate == "fixed"):
                _put(params, VECTORS[name], value)
        elif name in HEAD_NORMS:
            shared = value.shape == (config.head_dim,)
            _put(params, HEAD_NORMS[name], value if shared else value.reshape(-1, config.head_dim))
        else:
            raise ValueError(f"{name!r} is not a weight of a published attention layer")
    return params


def model_params(weights: Weights, config: ModelConfig) -> dict[str, Any]:
    """Parameters of a `LanguageModel` whose layers are all `forgetting`, from a published state dict.

    The layout follows config.scan_layers. ValueError for a missing layer or a name that is not known.
    """
    (name, options), *rest = config.layer_configs()
    if rest or name != "forgetting":
        raise ValueError(f"published models have forgetting layers only, not {config.layers!r}")
    layers = [_block(_below(weights, f"model.layers.{i}."), options) for i in range(config.num_layers)]
    params = {
        "embedding": weights["model.embeddings.weight"],
        "final_norm": {"scale": weights["model.norm.weight"]},
        "head": weights["lm_head.weight"].T,
    }
    if config.scan_layers:
        return params | {"layers": {"blocks_0": jax.tree.map(_stack, *layers)}}
    return params | {f"layers_{i}": {"blocks_0": layer} for i, layer in enumerate(layers)}


def _block(weights: Weights, options: ForgettingConfig) -> dict[str, Any]:
    both = weights["mlp.gate_proj.weight"].T
    gate, up = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
    return {
        "mixer_norm": {"scale": weights["attn_norm.weight"]},
        "mixer": attention_params(_below(weights, "attn."), options),
        "mlp_norm": {"scale": weights["mlp_norm.weight"]},
        "mlp": {
            "gate": {"kernel": gate},
            "up": {"kernel": up},
            "down": {"kernel": weights["mlp.down_proj.weight"].T},
        },
    }


def _stack(*leaves):
    """On the host for NumPy weights, so that a large import needs no device memory; traced ones stay JAX's."""
    return (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves)


def _below(weights: Weights, prefix: str) -> dict[str, np.ndarray]:
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"the published weights have no {prefix}*; check num_layers")
    return found


def _put(params: dict[str, Any], path: str, value: np.ndarray) -> None:
    *folders, last = path.split("/")
    for folder in folders:
        params = params.setdefault(folder, {})
    params[last] = value
