"""The language models around cosFormer by name, as ModelConfigs (arXiv 2202.08791, and the authors' training code).

Letters: L layers, C channels, H heads, I MLP width, V vocabulary.

The authors exchange the attention of plain decoders and keep their absolute position embeddings, ReLU feed-forward
layers of 4 C, layer norms and adaptive or tied embeddings. Our blocks have no position embedding (the cosine is the
only sense of order), RMS norms and a SwiGLU layer, whose I = 8 C / 3 gives as many parameters as 4 C.
"""

import dataclasses

from attnlab.attention.cosformer import CosformerConfig
from attnlab.attention.softmax import SoftmaxConfig
from attnlab.models.config import ModelConfig

WORDS = 50_265  # with the base sizes, the 44.65 million parameters the authors print for their comparison

# size: (L, C, H, training length, V)
COSFORMER_SIZES = {
    "base": (6, 512, 8, 512, WORDS),
    "base-h1-l7": (
        7,
        512,
        1,
        512,
        WORDS,
    ),  # one head; the output projection's parameters buy the seventh layer
    "12-layers": (12, 1024, 16, 512, WORDS),
    "large": (16, 1024, 8, 512, WORDS),  # the paper's own, in its width and depth
    "bytes": (2, 64, 4, 128, 0),  # a small model for text as bytes
}

# name: options of the `cosformer` mixer; None: softmax
COSFORMER_VARIANTS = {
    "cosformer": {},
    "relu": {"angle_scale": 0.0},
    "elu1": {"angle_scale": 0.0, "act": "elu1"},
    "elu1-cosine": {"act": "elu1"},
    "cosformer-norm": {"denominator": "norm"},
    "softmax": None,
}


def cosformer_preset(name: str, **changes) -> ModelConfig:
    """The model called e.g. "cosformer-base" or "softmax-bytes"; `changes` replace ModelConfig fields.

    M is the training length, so longer rows are refused. ValueError for an unknown name.
    """
    found = [
        (variant, size)
        for variant in COSFORMER_VARIANTS
        for size in COSFORMER_SIZES
        if name == f"{variant}-{size}"
    ]
    if not found:
        raise ValueError(
            f"unknown preset {name!r}; choose one of {', '.join(COSFORMER_VARIANTS)}, then a hyphen and one of "
            f"{', '.join(COSFORMER_SIZES)}"
        )
    ((variant, size),) = found
    layers, channels, heads, length, vocabulary = COSFORMER_SIZES[size]
    options = COSFORMER_VARIANTS[variant]
    config = ModelConfig(
        layers="softmax" if options is None else "cosformer",
        num_layers=layers,
        hidden_size=channels,
        num_heads=heads,
        mlp_size=round(8 * channels / 3),
        vocab_size=vocabulary,
        tie_embeddings=True,
        dtype="float32" if size == "bytes" else "bfloat16",
        remat="none" if size == "bytes" else "parts",
    )
    if options is None:
        mixer = {"softmax": SoftmaxConfig(rope=False)}
    else:
        mixer = {"cosformer": CosformerConfig(max_length=length, out_proj=size != "base-h1-l7", **options)}
    return dataclasses.replace(config, mixers=config.mixers | mixer, **changes)
