"""The models of Deconstructing Attention (arXiv 2510.11602) by name, as ModelConfigs.

Letters: L layers, C channels, H heads, I MLP width. 70m, 160m and 500m have the shapes of Qwen2.5 (biases of queries,
keys and values), 1.7b that of Qwen3 (QK-norm with one weight for all heads, heads of 128, no biases). Untied
embeddings and 50,304 tokens are our reading; the paper names neither.
"""

import dataclasses

from attnlab.attention.deconstructed import MLPMixerConfig, NonApproxConfig
from attnlab.attention.mixer import MIXERS
from attnlab.attention.softmax import SoftmaxConfig
from attnlab.attention.sourced import FixedMapConfig, StaticEmbeddingConfig
from attnlab.attention.taylor import ApproxConfig
from attnlab.models.config import ModelConfig
from attnlab.models.layouts import layout
from attnlab.models.streams import StreamConfig

VOCABULARY = 50_304
LENGTH = 2048
THETA = 1e6
NORM_EPS = 1e-6

# size: (L, C, H, I, QK-norm)
SIZES = {
    "70m": (6, 512, 8, 2048, False),
    "160m": (12, 768, 12, 3072, False),
    "500m": (24, 896, 14, 4864, False),
    "1.7b": (28, 2048, 16, 6144, True),
}
KINDS = ("softmax", "mlp", "approx", "nonapprox", "rndemb_qk", "fixedseq_qk", "staticemb_qk")


def deconstructed_preset(name: str, placement: str = "uniform", **changes) -> ModelConfig:
    """The model called e.g. "rndemb_qk-500m", its layers placed as a layout of `layouts.py` says.

    `changes` replace ModelConfig fields. ValueError for an unknown name or layout.
    """
    kind, _, size = name.rpartition("-")
    if kind not in KINDS or size not in SIZES:
        known = ", ".join(f"{k}-{s}" for k in KINDS for s in SIZES)
        raise ValueError(f"unknown preset {name!r}; known: {known}")
    layers, channels, heads, inner, qk_norm = SIZES[size]
    config = ModelConfig(
        layers=layout(placement, kind, layers) if kind != "softmax" else "softmax",
        num_layers=layers,
        hidden_size=channels,
        num_heads=heads,
        mlp_size=inner,
        vocab_size=VOCABULARY,
        norm_eps=NORM_EPS,
        dtype="bfloat16",
        remat="parts",
        streams=StreamConfig(length=LENGTH),
        mixers={name: mixer.Config() for name, mixer in sorted(MIXERS.items())} | options(qk_norm),
    )
    return dataclasses.replace(config, **changes)


def options(qk_norm: bool) -> dict:
    """Options of the seven kinds: with QK-norm as in Qwen3, else with biases as in Qwen2.5."""
    norm, bias = {"qk_norm": qk_norm}, {"qkv_bias": not qk_norm}
    rotary = {"rope_theta": THETA} | norm | bias
    shared = {"qk_norm_shared": True, "qk_norm_eps": NORM_EPS} if qk_norm else {}
    return {
        "softmax": SoftmaxConfig(**rotary, **shared),
        "mlp": MLPMixerConfig(**bias),
        "approx": ApproxConfig(**rotary),
        "nonapprox": NonApproxConfig(**norm, **bias),
        "rndemb_qk": FixedMapConfig(**rotary),
        "fixedseq_qk": FixedMapConfig(**rotary),
        "staticemb_qk": StaticEmbeddingConfig(**rotary),
    }
