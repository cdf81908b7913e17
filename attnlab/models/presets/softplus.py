"""The models of the softplus attention paper by name, as ModelConfigs (LSSA, LSSAR; arXiv 2501.13428).

Letters: L layers, C channels, H heads, D head size, I MLP width, V vocabulary.

The paper takes GPT-2 small, rotary positions in place of learned ones, and exchanges the attention alone. Our blocks
differ from GPT-2's in three ways: RMS norms, a SwiGLU feed-forward layer (I chosen for the same number of parameters
as GELU at 4 C), and no smaller initial deviation of the output projections.
"""

import dataclasses

from attnlab.attention.softplus import SoftplusConfig
from attnlab.models.config import ModelConfig

# size: (L, C, H, I, V); "bytes" is a small model for text as bytes, trained at length 128
SOFTPLUS_SIZES = {"124m": (12, 768, 12, 2048, 50257), "bytes": (3, 128, 4, 344, 0)}

# name: options of the `softplus` mixer; all but the last two are in the paper
SOFTPLUS_VARIANTS = {
    "softmax": {"variant": "softmax"},
    "sigmoid": {"variant": "sigmoid"},
    "relu": {"variant": "relu_over_n"},
    "lssa": {"variant": "lssa"},
    "lssar-p3": {"power": 3.0},
    "lssar-p15": {"power": 15.0},
    "softmax-p15": {"variant": "softmax_reweight"},
    "sigmoid-l1-p15": {"variant": "sigmoid_l1_reweight"},
    "unit-softmax": {
        "variant": "qknorm_softmax_logdlogn"
    },  # softmax with unit vectors and the log D log n scale
    "ssmax": {"variant": "ssmax"},
}


def softplus_preset(name: str, **changes) -> ModelConfig:
    """The model called e.g. "lssar-p15-124m" or "unit-softmax-bytes"; `changes` replace ModelConfig fields.

    ValueError for an unknown name.
    """
    variant, _, size = name.rpartition("-")
    if variant not in SOFTPLUS_VARIANTS or size not in SOFTPLUS_SIZES:
        raise ValueError(
            f"unknown preset {name!r}; choose one of {', '.join(SOFTPLUS_VARIANTS)}, then a hyphen and one of "
            f"{', '.join(SOFTPLUS_SIZES)}"
        )
    layers, channels, heads, mlp_size, vocabulary = SOFTPLUS_SIZES[size]
    config = ModelConfig(
        layers="softplus",
        num_layers=layers,
        hidden_size=channels,
        num_heads=heads,
        mlp_size=mlp_size,
        vocab_size=vocabulary,
        tie_embeddings=True,
        dtype="bfloat16" if size == "124m" else "float32",
        remat="parts" if size == "124m" else "none",
    )
    options = SOFTPLUS_VARIANTS[variant]
    if variant == "ssmax" and size == "bytes":
        options = options | {"ssmax_length": 128}
    mixers = config.mixers | {"softplus": SoftplusConfig(**options)}
    return dataclasses.replace(config, mixers=mixers, **changes)
