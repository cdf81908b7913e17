"""The models of Native Hybrid Attention (arXiv 2510.07019) by name, as ModelConfigs.

Letters: L layers, C channels, H query heads, K key/value heads, D head size, I MLP width, V vocabulary, W window.

The published defaults: 4 wide heads (D = C / 4), 64 slots, a window of 32, gates damped by tau = 8. Ours differs in one
thing: output projections start with the deviation of all others (the release makes them smaller by the depth).
"""

import dataclasses

from attnlab.attention.native_hybrid import NativeHybridConfig
from attnlab.attention.softmax import SoftmaxConfig
from attnlab.models.config import ModelConfig

MISTRAL_VOCABULARY = 32_000
CONTEXT = 2048  # trained length; a window of it sees everything

# size: (L, C, H, I)
HYBRID_SIZES = {"340m": (24, 1024, 4, 2816), "1.3b": (24, 2048, 4, 5632)}

# name: (window, distance between layers with the full window; 0: none)
HYBRID_VARIANTS = {"nha": (32, 0), "nha-hybrid": (32, 8), "gsa": (0, 0), "gsa-hybrid": (0, 8)}

# pretrained model: (L, C, H, K, D, I, V, theta, norm eps, qkv biases, per-head norms)
CONVERTED_SIZES = {
    "llama-3-8b": (32, 4096, 32, 8, 128, 14336, 128_256, 500_000.0, 1e-5, False, False),
    "qwen2.5-7b": (28, 3584, 28, 4, 128, 18944, 152_064, 1_000_000.0, 1e-6, True, False),
}


def window_pattern(window: int, every: int = 0, at: int = -1, full: int = CONTEXT) -> str:
    """Layer pattern in which layer l has the `full` window if l mod every == at, and `window` otherwise.

    every=0 gives all layers the same window; at=-1 is the last layer of each group of `every`. ValueError for an `at`
    outside the group.
    """
    if every == 0:
        return f"native_hybrid(window={window})"
    if not -every <= at < every or every < 1:
        raise ValueError(f"at={at} is no layer of a group of every={every}; choose one of 0..{every - 1}")
    groups = ((at % every, window), (1, full), (every - 1 - at % every, window))
    return " + ".join(
        f"native_hybrid(window={size})" + (f"*{count}" if count > 1 else "")
        for count, size in groups
        if count
    )


def native_hybrid_preset(name: str, **changes) -> ModelConfig:
    """The model called e.g. "nha-340m", "nha-hybrid-1.3b", "gsa-340m" or "nha-llama-3-8b"; `changes` replace fields.

    "transformer-340m" is the softmax baseline with the same heads. ValueError for an unknown name.
    """
    if name.removeprefix("nha-") in CONVERTED_SIZES:
        return _converted(name.removeprefix("nha-"), changes)
    variant, _, size = name.rpartition("-")
    if variant not in (*HYBRID_VARIANTS, "transformer") or size not in HYBRID_SIZES:
        known = [f"{v}-{s}" for v in (*HYBRID_VARIANTS, "transformer") for s in HYBRID_SIZES]
        known += [f"nha-{model}" for model in CONVERTED_SIZES]
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(known)}")
    layers, channels, heads, mlp_size = HYBRID_SIZES[size]
    baseline = variant == "transformer"
    config = ModelConfig(
        layers="softmax" if baseline else window_pattern(*HYBRID_VARIANTS[variant]),
        num_layers=layers,
        hidden_size=channels,
        num_heads=heads,
        mlp_size=mlp_size,
        vocab_size=MISTRAL_VOCABULARY,
        dtype="bfloat16",
        remat="parts",
    )
    mixers = {"native_hybrid": NativeHybridConfig(), "softmax": SoftmaxConfig(rope_theta=10_000.0)}
    return dataclasses.replace(config, **({"mixers": config.mixers | mixers} | changes))


def _converted(model: str, changes: dict) -> ModelConfig:
    layers, channels, heads, kv_heads, dim, mlp_size, vocabulary, theta, eps, bias, norm = CONVERTED_SIZES[
        model
    ]
    options = NativeHybridConfig(
        style="converted", slots=32, rope_theta=theta, qkv_bias=bias, qk_norm=norm, qk_norm_shared=norm
    )
    config = ModelConfig(
        layers=window_pattern(32, 8 if layers % 8 == 0 else 7),
        num_layers=layers,
        hidden_size=channels,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        mlp_size=mlp_size,
        vocab_size=vocabulary,
        norm_eps=eps,
        dtype="bfloat16",
        remat="parts",
    )
    return dataclasses.replace(config, **({"mixers": config.mixers | {"native_hybrid": options}} | changes))
