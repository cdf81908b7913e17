"""Attention mechanisms, one file a paper: pure functions in the paper's order, then the Flax module with its cache."""

from attnlab.attention.forgetting import (
    ForgettingAttention,
    ForgettingConfig,
    log_forget_gate,
    log_spaced_bias,
    token_shift,
)
from attnlab.attention.mixer import MIXERS, Mixer, MixerConfig, find_mixer, parse_pattern, register
from attnlab.attention.softmax import SoftmaxAttention, SoftmaxConfig, softmax_attention
from kernels.forgetting import forgetting_attention
from kernels.masks import Mask

__all__ = [
    "MIXERS",
    "ForgettingAttention",
    "ForgettingConfig",
    "Mask",
    "Mixer",
    "MixerConfig",
    "SoftmaxAttention",
    "SoftmaxConfig",
    "find_mixer",
    "forgetting_attention",
    "log_forget_gate",
    "log_spaced_bias",
    "parse_pattern",
    "register",
    "softmax_attention",
    "token_shift",
]
