"""Operations of the max-plus semiring: matrix product, attention, and the scans that make it causal and linear.

Tropical Attention, arXiv 2505.17190. Max takes the place of the sum and + that of the product; -inf is zero, 0 is one.
The lowest index wins every tie and gradients go to winners alone, whatever the implementation.
"""

from kernels.tropical.attention import (
    SCORES,
    BlockSizes,
    combine_contexts,
    devalue,
    shift_winners,
    tropical_attention,
    tropical_scores,
)
from kernels.tropical.linear import maxplus_linear_attention
from kernels.tropical.matmul import maxplus_matmul
from kernels.tropical.scan import maxplus_scan

__all__ = [
    "SCORES",
    "BlockSizes",
    "combine_contexts",
    "devalue",
    "maxplus_linear_attention",
    "maxplus_matmul",
    "maxplus_scan",
    "shift_winners",
    "tropical_attention",
    "tropical_scores",
]
