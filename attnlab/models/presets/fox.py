"""The paper's models by name, as ModelConfigs (FoX, arXiv 2503.02130, table of sizes; "LLaMA" and "Pro" blocks).

Letters: L layers, C channels, H heads, D head size, I MLP width, V vocabulary.
"""

import dataclasses

from attnlab.attention.forgetting import PRO, ForgettingConfig
from attnlab.models.config import ModelConfig

GPT2_VOCABULARY = 50257

# size: (L, C, H of FoX, H of the Transformer, I of LLaMA blocks, I of Pro blocks)
FOX_SIZES = {
    "125m": (12, 768, 12, 12, 2048, 1792),
    "360m": (24, 1024, 16, 16, 2816, 2560),
    "760m": (24, 1536, 24, 12, 4096, 3584),
}

# block: options of the `forgetting` mixer
FOX_BLOCKS = {
    "fox-llama": {},
    "fox-pro": PRO,
    "transformer-llama": {"gate": "none", "rope": True},
    "transformer-pro": PRO | {"gate": "none", "rope": True},
}


def fox_preset(name: str, **changes) -> ModelConfig:
    """The model called e.g. "fox-pro-360m" or "transformer-llama-125m"; `changes` replace ModelConfig fields.

    ValueError for an unknown name.
    """
    block, _, size = name.rpartition("-")
    if block not in FOX_BLOCKS or size not in FOX_SIZES:
        known = ", ".join(f"{b}-{s}" for b in FOX_BLOCKS for s in FOX_SIZES)
        raise ValueError(f"unknown preset {name!r}; known: {known}")
    layers, channels, fox_heads, plain_heads, llama_size, pro_size = FOX_SIZES[size]
    config = ModelConfig(
        layers="forgetting",
        num_layers=layers,
        hidden_size=channels,
        num_heads=fox_heads if block.startswith("fox") else plain_heads,
        mlp_size=pro_size if block.endswith("pro") else llama_size,
        vocab_size=GPT2_VOCABULARY,
        dtype="bfloat16",
        remat="parts",
    )
    mixers = config.mixers | {"forgetting": ForgettingConfig(**FOX_BLOCKS[block])}
    return dataclasses.replace(config, mixers=mixers, **changes)
