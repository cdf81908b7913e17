"""Softmax attention (arXiv 1706.03762), the baseline: rotary or no positions, grouped queries, QK-norm, a window.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j        over the visible keys j

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, C channels.
"""

import dataclasses
from typing import Any, ClassVar

import jax

from attnlab.attention import kv_cache
from attnlab.attention.heads import head_norm, merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig, register
from attnlab.attention.rotary import rotate
from kernels.forgetting import forgetting_attention
from kernels.masks import Mask

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(MixerConfig):
    rope: bool = True
    rope_theta: float = 500_000.0
    qk_norm: bool = False
    qk_norm_shared: bool = False  # one norm weight [D] for all heads instead of [H, D]
    qk_norm_eps: float = 1e-5
    window: int = 0  # a query sees the last `window` positions, its own included; 0: all before it

    def validate(self) -> None:
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, got {self.head_dim}; change it or set rope=False")
        if self.window < 0:
            raise ValueError(f"window={self.window} is negative; use 0 for no window")
        if self.qk_norm_shared and not self.qk_norm:
            raise ValueError("qk_norm_shared=True has no effect with qk_norm=False; set qk_norm=True")


def softmax_attention(
    q: Array, k: Array, v: Array, *, mask: Mask | None = None, scale: float | None = None, implementation=None
) -> Array:
    """Causal softmax attention: the gate-free case of `kernels.forgetting.forgetting_attention`, which says more.

    q [B, T, H, D]; k [B, S, K, D]; v [B, S, K, Dv]; returns [B, T, H, Dv] in q's dtype.
    """
    return forgetting_attention(q, k, v, mask=mask or Mask(), scale=scale, implementation=implementation)


@register("softmax")
class SoftmaxAttention(Mixer):
    """Multi-head softmax attention as a mixer; its cache is a `KVCache`, rolling when there is a window."""

    Config: ClassVar[type[MixerConfig]] = SoftmaxConfig

    def setup(self):
        c = self.config
        self.query = self.dense(c.num_heads * c.head_dim, "query")
        self.key = self.dense(c.num_kv_heads * c.head_dim, "key")
        self.value = self.dense(c.num_kv_heads * c.head_dim, "value")
        self.out = self.dense(self.hidden_size, "out")
        if c.qk_norm:
            rest = (c.head_dim, c.qk_norm_eps, c.qk_norm_shared, self.param_dtype)
            self.query_norm = head_norm(c.num_heads, *rest, "query_norm")
            self.key_norm = head_norm(c.num_kv_heads, *rest, "key_norm")

    def heads(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """q [B, T, H, D], k and v [B, T, K, D] of x [B, T, C]: projected, normed, then rotated."""
        c = self.config
        q = split_heads(self.query(x), c.num_heads)
        k = split_heads(self.key(x), c.num_kv_heads)
        v = split_heads(self.value(x), c.num_kv_heads)
        if c.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if c.rope:
            q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
        return q, k, v

    def __call__(self, x, *, positions, segments=None, starts=None):
        c = self.config
        q, k, v = self.heads(x, positions)
        mask = Mask(window=c.window or None, q_segments=segments, kv_segments=segments, starts=starts)
        o = softmax_attention(q, k, v, mask=mask, implementation=c.implementation or None)
        return self.out(merge_heads(o))

    def init_cache(self, batch, length, starts=None):
        c = self.config
        return kv_cache.init_cache(
            batch, length, c.num_kv_heads, c.head_dim, self.dtype, window=c.window or None, starts=starts
        )

    def prefill(self, x, cache):
        c = self.config
        q, k, v = self.heads(x, kv_cache.new_positions(cache, x.shape[1]))
        (k, v, _, mask), cache = kv_cache.extend(cache, k, v, None, c.window or None)
        name = c.implementation or ("reference" if x.shape[1] == 1 else None)  # one row: dense is linear in S
        o = softmax_attention(q, k, v, mask=mask, implementation=name)
        return kv_cache.poison_overflow(self.out(merge_heads(o)), cache), cache

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        projections = 2 * hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        seen = min(visible, c.window) if c.window else visible
        return projections + 2 * 2 * c.num_heads * c.head_dim * seen
