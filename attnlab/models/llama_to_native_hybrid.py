"""Pretrained Llama, Qwen2 and Qwen3 models as Native Hybrid Attention models (arXiv 2510.07019, section on conversion).

Every weight is copied; the one new projection, of the slots' gates, starts from the key projection. With windows that
see everything and empty_slots="mask" the converted model computes exactly what the pretrained one does.

Published names are those of Hugging Face's state dicts, where a linear weight is [out, in]. Letters: L layers, C
channels, H query heads, K key/value heads, D head size, M slots, I MLP width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from attnlab.attention.native_hybrid import NativeHybridConfig
from attnlab.models.config import ModelConfig
from attnlab.models.presets.native_hybrid import CONTEXT, window_pattern

Weights = Mapping[str, np.ndarray]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# published name below a layer -> ours
KERNELS = {
    "self_attn.q_proj.weight": "mixer/query/kernel",
    "self_attn.k_proj.weight": "mixer/key/kernel",
    "self_attn.v_proj.weight": "mixer/value/kernel",
    "self_attn.o_proj.weight": "mixer/out/kernel",
    "mlp.gate_proj.weight": "mlp/gate/kernel",
    "mlp.up_proj.weight": "mlp/up/kernel",
    "mlp.down_proj.weight": "mlp/down/kernel",
}
VECTORS = {
    "self_attn.q_proj.bias": "mixer/query/bias",
    "self_attn.k_proj.bias": "mixer/key/bias",
    "self_attn.v_proj.bias": "mixer/value/bias",
    "self_attn.q_norm.weight": "mixer/query_norm/scale",
    "self_attn.k_norm.weight": "mixer/key_norm/scale",
    "input_layernorm.weight": "mixer_norm/scale",
    "post_attention_layernorm.weight": "mlp_norm/scale",
}


def native_hybrid_config(
    published: Mapping[str, Any], *, window: int = 32, slots: int = 32, every: int = 8, at: int = -1,
    full: int = CONTEXT, empty_slots: str = "sink", **changes: Any,
) -> ModelConfig:  # fmt: skip
    """The ModelConfig of a published model, from the entries of its config.json.

    Args:
        published: needs model_type, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, vocab_size.
        window, slots: W and M of the layers.
        every, at, full: layer l has the window `full` if l mod every == at (the paper keeps 4 of 32); every=0: none.
        empty_slots: as in NativeHybridConfig.
        changes: ModelConfig fields.

    Raises: ValueError for a model this cannot express, such as experts, scaled rotary angles or an output bias.
    """
    kind = published.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type={kind!r} cannot be converted; known: {', '.join(FAMILIES)}")
    _refuse(published, "hidden_act", ("silu",))
    for name in ("rope_scaling", "attention_bias", "use_sliding_window", "mlp_bias"):
        _refuse(published, name, (None, False))
    if kind == "mistral":
        _refuse(published, "sliding_window", (None,))
    heads, channels = published["num_attention_heads"], published["hidden_size"]
    mixer = NativeHybridConfig(
        style="converted",
        slots=slots,
        empty_slots=empty_slots,
        rope_theta=float(published.get("rope_theta", 10_000.0)),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        qk_norm_shared=kind == "qwen3",
        qk_norm_eps=published.get("rms_norm_eps", 1e-6),
    )
    options = {
        "layers": window_pattern(window, every, at, full),
        "num_layers": published["num_hidden_layers"],
        "hidden_size": channels,
        "num_heads": heads,
        "num_kv_heads": published.get("num_key_value_heads") or heads,
        "head_dim": published.get("head_dim") or channels // heads,
        "mlp_size": published["intermediate_size"],
        "vocab_size": published["vocab_size"],
        "tie_embeddings": published.get("tie_word_embeddings", False),
        "norm_eps": published.get("rms_norm_eps", 1e-6),
        "mixers": ModelConfig().mixers | {"native_hybrid": mixer},
    }
    return ModelConfig(**(options | changes))


def gates_from_keys(key: np.ndarray, kv_heads: int, slots: int) -> np.ndarray:
    """A gate projection [K*M, C] from a key projection [K*D, C], head by head.

    Slot m takes the mean of D/M consecutive rows when M divides D, and rows are repeated in order when D divides M. How
    the published conversion maps them is not known. ValueError when neither divides the other.
    """
    rows = np.asarray(key).reshape(kv_heads, -1, key.shape[-1])
    D = rows.shape[1]
    if D % slots == 0:
        rows = rows.reshape(kv_heads, slots, D // slots, -1).mean(2)
    elif slots % D == 0:
        rows = np.tile(rows, (1, slots // D, 1))
    else:
        raise ValueError(f"slots={slots} and the head size {D} do not divide each other; choose other slots")
    return rows.reshape(kv_heads * slots, -1)


def native_hybrid_params(weights: Weights, config: ModelConfig, *, gates: str = "keys") -> dict[str, Any]:
    """Parameters of a `LanguageModel` of native_hybrid layers from a published state dict.

    gates: "keys" (see `gates_from_keys`), or "zero": every slot keeps 2^(-1/tau) of itself, whatever the token.
    The layout follows config.scan_layers. ValueError for a name that is missing or not known.
    """
    if gates not in ("keys", "zero"):
        raise ValueError(f"gates={gates!r} is unknown; choose 'keys' or 'zero'")
    names = {name for name, _ in config.layer_configs()}
    if names != {"native_hybrid"}:
        raise ValueError(f"weights are converted to native_hybrid layers only, not to {config.layers!r}")
    mixers = [options for _, options in config.layer_configs()]
    layers = [
        _block(_below(weights, f"model.layers.{i}."), mixers[i % len(mixers)], gates)
        for i in range(config.num_layers)
    ]
    params = {
        "embedding": np.asarray(weights["model.embed_tokens.weight"]),
        "final_norm": {"scale": np.asarray(weights["model.norm.weight"])},
    }
    if not config.tie_embeddings:
        params["head"] = np.asarray(weights["lm_head.weight"]).T
    return params | _arranged(layers, len(mixers), config.scan_layers)


def _arranged(layers: list[dict], period: int, scanned: bool) -> dict[str, Any]:
    """Layers where LanguageModel looks for them: stacked over periods, or one period after the other."""
    if scanned:
        stacked = {
            f"blocks_{b}": jax.tree.map(lambda *leaves: np.stack(leaves), *layers[b::period])
            for b in range(period)
        }
        return {"layers": stacked}
    periods = (layers[first : first + period] for first in range(0, len(layers), period))
    return {
        f"layers_{p}": {f"blocks_{b}": each for b, each in enumerate(blocks)}
        for p, blocks in enumerate(periods)
    }


def _block(weights: Weights, mixer: NativeHybridConfig, gates: str) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, value in weights.items():
        if name in KERNELS:
            _put(params, KERNELS[name], np.asarray(value).T)
        elif name in VECTORS:
            _put(params, VECTORS[name], np.asarray(value))
        elif not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(
                f"{name!r} is not a weight of a published Llama or Qwen layer that can be converted"
            )
    gate = gates_from_keys(weights["self_attn.k_proj.weight"], mixer.num_kv_heads, mixer.slots)
    _put(params, "mixer/forget_gate/kernel", (gate if gates == "keys" else np.zeros_like(gate)).T)
    return params


def _refuse(published: Mapping[str, Any], name: str, fine: tuple) -> None:
    if name in published and published[name] not in fine:
        raise ValueError(f"{name}={published[name]!r} cannot be converted; only {fine[0]!r} can")


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
