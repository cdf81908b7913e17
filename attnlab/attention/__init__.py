"""Attention mechanisms, one file a paper: pure functions in the paper's order, then the Flax module with its cache.

A paper that needs more room has further files beside its first. Importing this package registers every mixer.

    softmax            the baseline, with ALiBi, log-n scaling, sinks, adaptive temperature (`adaptive`)
    forgetting         Forgetting Transformer
    cosformer          cosFormer; `cosformer_states` its two recurrences, `cosformer_cross` its cross attention
    softplus           LSSA and LSSAR; `normalised_family` what they are members of, `attention_metrics`
    inverse_distance   inverse distance weighting; `prototypes` its one-hidden-layer network
    native_hybrid      Native Hybrid Attention
    tropical           Tropical attention as a set layer; `tropical_causal`, `tropical_scan` as language-model layers
    deconstructed      Deconstructing Attention: MLP and non-approximate; `taylor` approximate, `sourced` maps made from
                       other streams; `controls`, `synthesizer`, `position_mixing` further ones; `indicators` of maps
"""

from attnlab.attention.adaptive import adaptive_softmax, adaptive_temperature
from attnlab.attention.attention_metrics import attention_metrics
from attnlab.attention.controls import aft_simple, uniform_attention
from attnlab.attention.cosformer import CosformerAttention, CosformerConfig, cosformer_attention
from attnlab.attention.cosformer_cross import CrossCosformerAttention
from attnlab.attention.deconstructed import nonapprox_attention
from attnlab.attention.forgetting import (
    ForgettingAttention,
    ForgettingConfig,
    log_forget_gate,
    log_spaced_bias,
    token_shift,
)
from attnlab.attention.indicators import attention_map, indicators
from attnlab.attention.inverse_distance import (
    InverseDistanceAttention,
    InverseDistanceConfig,
    inverse_distance_attention,
)
from attnlab.attention.mixer import MIXERS, Mixer, MixerConfig, find_mixer, parse_pattern, register
from attnlab.attention.native_hybrid import (
    NativeHybridAttention,
    NativeHybridConfig,
    native_hybrid_attention,
    slot_log_gates,
)
from attnlab.attention.normalised_family import family_attention
from attnlab.attention.position_mixing import fourier_mixing, token_mlp
from attnlab.attention.prototypes import idw_network
from attnlab.attention.softmax import (
    SoftmaxAttention,
    SoftmaxConfig,
    alibi_slopes,
    log_n_scale,
    softmax_attention,
)
from attnlab.attention.softplus import SoftplusAttention, SoftplusConfig, lssa, lssar, softplus_attention
from attnlab.attention.sourced import shared_qk_attention
from attnlab.attention.synthesizer import (
    synth_dense,
    synth_dense_fact,
    synth_mix,
    synth_random,
    synth_random_fact,
)
from attnlab.attention.taylor import taylor_attention
from attnlab.attention.tropical import MultiHeadTropicalAttention, tropical_linear
from attnlab.attention.tropical_causal import TropicalConfig, TropicalMixer
from attnlab.attention.tropical_scan import TropicalLinearMixer, TropicalScanMixer
from kernels.forgetting import forgetting_attention
from kernels.masks import Mask
from kernels.tropical.attention import tropical_attention
from kernels.tropical.linear import maxplus_linear_attention
from kernels.tropical.matmul import maxplus_matmul
from kernels.tropical.scan import maxplus_scan

__all__ = [
    "MIXERS",
    "CosformerAttention",
    "CosformerConfig",
    "CrossCosformerAttention",
    "ForgettingAttention",
    "ForgettingConfig",
    "InverseDistanceAttention",
    "InverseDistanceConfig",
    "Mask",
    "Mixer",
    "MixerConfig",
    "MultiHeadTropicalAttention",
    "NativeHybridAttention",
    "NativeHybridConfig",
    "SoftmaxAttention",
    "SoftmaxConfig",
    "SoftplusAttention",
    "SoftplusConfig",
    "TropicalConfig",
    "TropicalLinearMixer",
    "TropicalMixer",
    "TropicalScanMixer",
    "adaptive_softmax",
    "adaptive_temperature",
    "aft_simple",
    "alibi_slopes",
    "attention_map",
    "attention_metrics",
    "cosformer_attention",
    "family_attention",
    "find_mixer",
    "forgetting_attention",
    "fourier_mixing",
    "idw_network",
    "indicators",
    "inverse_distance_attention",
    "log_forget_gate",
    "log_n_scale",
    "log_spaced_bias",
    "lssa",
    "lssar",
    "maxplus_linear_attention",
    "maxplus_matmul",
    "maxplus_scan",
    "native_hybrid_attention",
    "nonapprox_attention",
    "parse_pattern",
    "register",
    "shared_qk_attention",
    "slot_log_gates",
    "softmax_attention",
    "softplus_attention",
    "synth_dense",
    "synth_dense_fact",
    "synth_mix",
    "synth_random",
    "synth_random_fact",
    "taylor_attention",
    "token_mlp",
    "token_shift",
    "tropical_attention",
    "tropical_linear",
    "uniform_attention",
]
