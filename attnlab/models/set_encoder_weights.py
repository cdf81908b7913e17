"""Weights of the published Tropical Attention models (Baran-phys/Tropical-Attention) under attnlab's names, and back.

A published linear weight is [out, in], so kernels are transposes; tropical maps keep their [out, in] layout. Several
tropical layers of a published model share one attention, stored under layers.0: our `share_attn_across_layers`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnlab.models.set_encoder import SetEncoderConfig

ATTENTION = {
    "query_linear.weight": "query/kernel",
    "key_linear.weight": "key/kernel",
    "value_linear.weight": "value/kernel",
    "out.weight": "out/kernel",
    "query_trop.W": "query_trop",
    "key_trop.W": "key_trop",
    "value_trop.W": "value_trop",
    "lambda_param": "lambda_param",
}
LAYER = {
    "ff.0.weight": "feed_forward/up/kernel",
    "ff.0.bias": "feed_forward/up/bias",
    "ff.2.weight": "feed_forward/down/kernel",
    "ff.2.bias": "feed_forward/down/bias",
    "norm1.weight": "attention_norm/scale",
    "norm1.bias": "attention_norm/bias",
    "norm2.weight": "feed_forward_norm/scale",
    "norm2.bias": "feed_forward_norm/bias",
}
MODEL = {
    "input_linear.weight": "input/kernel",
    "input_linear.bias": "input/bias",
    "encoder.last_norm.weight": "final_norm/scale",
    "encoder.last_norm.bias": "final_norm/bias",
    "output_linear.weight": "head/kernel",
    "output_linear.bias": "head/bias",
}


def published_names(config: SetEncoderConfig) -> dict[str, str]:
    """Published name -> ours, for every weight that a model of any attention may have."""
    names = dict(MODEL)
    for i in range(config.num_layers):
        theirs, ours = f"encoder.layers.{i}.", f"layers_{i}/"
        names |= {theirs + name: ours + path for name, path in LAYER.items()}
        if i == 0 or not config.share_attn_across_layers:
            ours = "" if config.share_attn_across_layers else ours
            names |= {f"{theirs}attn.{name}": f"{ours}attention/{path}" for name, path in ATTENTION.items()}
    return names


def set_encoder_params(weights: Mapping[str, np.ndarray], config: SetEncoderConfig) -> dict[str, Any]:
    """Parameters of `SetEncoder(config)` from a published state dict; ValueError for a name without a place in it.

    A post-norm model without `published_final_norm` leaves out the final norm, which it does not use.
    """
    names, params = published_names(config), {}
    for name, value in weights.items():
        if name not in names:
            raise ValueError(
                f"{name!r} has no place in the encoder; check num_layers and sharing of attention"
            )
        if names[name].startswith("final_norm/") and not (config.pre_norm or config.published_final_norm):
            continue
        _put(params, names[name], _converted(names[name], np.asarray(value)))
    return params


def published_weights(params: Mapping[str, Any], config: SetEncoderConfig) -> dict[str, np.ndarray]:
    """The inverse of `set_encoder_params`, for parameters or for gradients of the same tree."""
    names = {ours: theirs for theirs, ours in published_names(config).items()}
    return {names[path]: _published(path, np.asarray(value)) for path, value in _flat(params).items()}


def _converted(path: str, value: np.ndarray) -> np.ndarray:
    if path.endswith("/kernel"):
        return value.T
    return value.reshape(-1) if path.endswith("/lambda_param") else value


def _published(path: str, value: np.ndarray) -> np.ndarray:
    if path.endswith("/kernel"):
        return value.T
    return value.reshape(1, 1, -1) if path.endswith("/lambda_param") else value


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in params.items():
        path = prefix + name
        flat |= _flat(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def _put(params: dict[str, Any], path: str, value: np.ndarray) -> None:
    *folders, last = path.split("/")
    for folder in folders:
        params = params.setdefault(folder, {})
    params[last] = value
