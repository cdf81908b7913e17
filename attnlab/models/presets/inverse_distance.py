"""Language models with inverse distance weighting attention (arXiv 2310.18805), as ModelConfigs.

The paper has no language model and prescribes no size: these are small byte models for comparing its attention with
softmax in the same block.

Letters: L layers, C channels, H heads, D head size.
"""

import dataclasses

from attnlab.attention.inverse_distance import InverseDistanceConfig
from attnlab.models.config import ModelConfig

# size: (L, C, H); D = C / H
INVERSE_DISTANCE_SIZES = {"tiny": (2, 64, 4), "small": (4, 256, 4)}

# block: options of the `inverse_distance` mixer; None for softmax attention
INVERSE_DISTANCE_BLOCKS = {
    "idw": {},  # p = sqrt(2 D) at first, learned a head
    "idw-p2": {"power": 2.0, "learn_power": False, "form": "official"},  # the paper's weights
    "softmax": None,
}


def inverse_distance_preset(name: str, **changes) -> ModelConfig:
    """The model called e.g. "idw-tiny", "idw-p2-small" or "softmax-tiny"; `changes` replace ModelConfig fields.

    ValueError for an unknown name.
    """
    block, _, size = name.rpartition("-")
    if block not in INVERSE_DISTANCE_BLOCKS or size not in INVERSE_DISTANCE_SIZES:
        known = ", ".join(f"{b}-{s}" for b in INVERSE_DISTANCE_BLOCKS for s in INVERSE_DISTANCE_SIZES)
        raise ValueError(f"unknown preset {name!r}; known: {known}")
    layers, channels, heads = INVERSE_DISTANCE_SIZES[size]
    options = INVERSE_DISTANCE_BLOCKS[block]
    config = ModelConfig(
        layers="softmax" if options is None else "inverse_distance",
        num_layers=layers,
        hidden_size=channels,
        num_heads=heads,
    )
    if options is not None:
        mixers = config.mixers | {"inverse_distance": InverseDistanceConfig(**options)}
        config = dataclasses.replace(config, mixers=mixers)
    return dataclasses.replace(config, **changes)
