"""Causal tropical attention with a key/value cache: the quadratic form, for language models.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, C channels; m_h a slope.

    S_ij = score(q_i, k_j) - m_h (i - j),   c_id = max_{j <= i} (S_ij + v_jd),   o = expm1(min(c, clip))
Ours: the paper (arXiv 2505.17190) has neither order nor a causal form. The slope is its constant-decay case.
Some heads may be softmax heads instead; then each kind is normalised by itself before they are joined.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnlab.attention import kv_cache
from attnlab.attention.heads import merge_heads
from attnlab.attention.mixer import MixerConfig, register
from attnlab.attention.norm import RMSNorm
from attnlab.attention.softmax import softmax_attention
from attnlab.attention.tropical import check_smoothing, tropical_attention
from attnlab.attention.tropical_heads import (
    RotaryTropicalConfig,
    TropicalHeads,
    head_slopes,
    inverse_softplus,
    map_flops,
)
from kernels.masks import Mask
from kernels.tropical.attention import IMPLEMENTATIONS

Array = jax.Array
SLOPES = ("alibi", "learned", "none")
CACHE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TropicalConfig(RotaryTropicalConfig):
    score: str = "hilbert"  # "hilbert_asym", "maxplus_dot" or "lse_dot"
    score_scale: float = 1.0
    smooth_beta: float = 0.0  # soften every maximum to (1 / beta) log sum exp(beta .); 0: hard
    slope: str = "alibi"  # score lost per position: 2^(-8 h / H), the same as a start ("learned"), or "none"
    window: int = 0  # a query sees the last `window` positions, its own included; 0: all before it
    softmax_heads: int = 0  # so many of the last query heads are softmax heads
    cache_dtype: str = "float32"  # of cached keys and values; "bfloat16" halves it but changes winners

    def validate(self) -> None:
        super().validate()
        check_smoothing(self)
        for name, known in (("slope", SLOPES), ("cache_dtype", CACHE_DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {known}")
        if self.window < 0:
            raise ValueError(f"window={self.window} is negative; use 0 for no window")
        group = self.num_heads // self.num_kv_heads
        if self.softmax_heads % group or not 0 <= self.softmax_heads < self.num_heads:
            raise ValueError(
                f"softmax_heads={self.softmax_heads} must be a multiple of {group}, the query heads of a key/value "
                f"head, and below num_heads={self.num_heads}"
            )
        if self.softmax_heads and self.output_norm:
            raise ValueError(
                "output_norm=True goes with softmax_heads=0 only: mixed heads have norms of their own"
            )


@register("tropical")
class TropicalMixer(TropicalHeads):
    """Causal tropical attention; its cache is a `KVCache` of mapped keys and values."""

    Config: ClassVar[type[MixerConfig]] = TropicalConfig
    paper: ClassVar[str] = "Tropical Attention, arXiv 2505.17190"
    masks: ClassVar[tuple[str, ...]] = ("causal", "segments", "left padding", "window", "grouped heads")
    implementations: ClassVar[tuple] = IMPLEMENTATIONS

    def setup(self):
        c = self.config
        self.setup_attention()
        kv_heads = c.num_kv_heads - self.softmax_kv_heads
        self.setup_maps({"query": self.tropical_heads, "key": kv_heads, "value": kv_heads})
        if c.slope == "learned":
            start = jnp.asarray(inverse_softplus(head_slopes(self.tropical_heads)), self.param_dtype)
            self.slope_logit = self.param("slope_logit", lambda _: start)
        if c.softmax_heads:
            self.tropical_norm = self._norm("tropical_norm", self.tropical_heads)
            self.softmax_norm = self._norm("softmax_norm", c.softmax_heads)

    def _norm(self, name: str, heads: int) -> RMSNorm:
        """Over all channels of one kind of heads."""
        return RMSNorm((heads * self.config.head_dim,), self.norm_eps, self.param_dtype, name=name)

    @property
    def tropical_heads(self) -> int:
        return self.config.num_heads - self.config.softmax_heads

    @property
    def softmax_kv_heads(self) -> int:
        return self.config.softmax_heads * self.config.num_kv_heads // self.config.num_heads

    def heads(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """q [B, T, H, D], k and v [B, T, K, D]: the first heads in log space, softmax heads as projected."""
        named = zip(("query", "key", "value"), self.project(x, positions), strict=True)
        return tuple(self._mapped(heads, name) for name, heads in named)

    def _mapped(self, heads: Array, name: str) -> Array:
        count = self.tropical_heads if name == "query" else self.config.num_kv_heads - self.softmax_kv_heads
        u = self.to_log_space(heads[:, :, :count], name)
        return jnp.concatenate([u, heads[:, :, count:].astype(u.dtype)], axis=2)

    def slopes(self) -> Array | None:
        """m [H], or None without slopes."""
        if self.config.slope == "learned":
            return jax.nn.softplus(self.slope_logit.astype(self.wide))
        return (
            None if self.config.slope == "none" else jnp.asarray(head_slopes(self.tropical_heads), self.wide)
        )

    def attend(self, q: Array, k: Array, v: Array, mask: Mask, kernel: str | None) -> Array:
        """y [B, T, C] of mapped q [B, T, H, D], k and v [B, S, K, D]."""
        c, H, K = self.config, self.tropical_heads, self.config.num_kv_heads - self.softmax_kv_heads
        o = tropical_attention(
            q[:, :, :H], k[:, :, :K], v[:, :, :K], score=c.score, mask=mask, slopes=self.slopes(),
            score_scale=c.score_scale, smooth_beta=c.smooth_beta or None, context_clip=c.context_clip or None,
            devaluation=c.devaluation, implementation=kernel,
        )  # fmt: skip
        if not c.softmax_heads:
            return self.readout(o)
        p = softmax_attention(q[:, :, H:], k[:, :, K:], v[:, :, K:], mask=mask, implementation=kernel)
        joined = [self.tropical_norm(merge_heads(o)), self.softmax_norm(merge_heads(p))]
        return self.out(jnp.concatenate(joined, axis=-1).astype(self.dtype))

    def __call__(self, x, *, positions, segments=None, starts=None):
        mask = Mask(
            window=self.config.window or None, q_segments=segments, kv_segments=segments, starts=starts
        )
        return self.attend(*self.heads(x, positions), mask, self.kernel)

    def init_cache(self, batch, length, starts=None):
        c = self.config
        dtype = jnp.bfloat16 if c.cache_dtype == "bfloat16" else self.wide
        sizes = (batch, length, c.num_kv_heads, c.head_dim)
        return kv_cache.init_cache(*sizes, dtype, window=c.window or None, starts=starts)

    def prefill(self, x, cache):
        q, k, v = self.heads(x, kv_cache.new_positions(cache, x.shape[1]))
        (k, v, _, mask), cache = kv_cache.extend(cache, k, v, None, self.config.window or None)
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        one_row = x.shape[1] == 1  # dense is linear in S then
        y = self.attend(q, k, v, mask, self.kernel or ("reference" if one_row else None))
        return kv_cache.poison_overflow(y, cache), cache

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        """Matrix products, and the additions and comparisons that take their place in max-plus algebra."""
        c, K = config, config.num_kv_heads
        projections = 2 * hidden_size * c.head_dim * (2 * c.num_heads + 2 * K)
        seen = min(visible, c.window) if c.window else visible
        tropical, group = c.num_heads - c.softmax_heads, c.num_heads // K
        maps = map_flops(c, tropical + 2 * tropical // group)
        of_score = {"hilbert": 3, "hilbert_asym": 2}.get(c.score, 2)
        pairs = tropical * (of_score + 2) + c.softmax_heads * 4
        return projections + maps + pairs * c.head_dim * seen

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        slots = min(length, config.window) if config.window else length
        return 2 * slots * config.num_kv_heads * config.head_dim
