"""Softmax attention (arXiv 1706.03762), the baseline, with the modifications it is usually compared under.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, C channels, N training length.

    s_ij = r_i q_i . k_j / sqrt(D) - m_h (i - j)        m_h: ALiBi slopes (arXiv 2108.12409); r_i = 1, or
    r_i  = log n_i / log N                              log-n scaling of a row with n_i visible keys (2501.19399)
    s    <- beta_i s,  beta_i = beta(entropy of softmax_j(s_ij))         adaptive temperature (arXiv 2410.01104)
    o_i  = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + exp(z_h))            z_h: a sink (2309.17453); none: -inf
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention import kv_cache
from attnlab.attention.adaptive import temperature_of_entropy
from attnlab.attention.heads import head_norm, merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig, register
from attnlab.attention.rotary import rotate
from kernels.forgetting import IMPLEMENTATIONS, forgetting_attention
from kernels.masks import Mask
from kernels.signatures import Array, Float, checked

SINKS = ("none", "zero", "learned")


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(MixerConfig):
    rope: bool = True
    rope_theta: float = 500_000.0
    alibi: bool = False  # distance penalties m_h (i - j); set rope=False for the paper's form
    qkv_bias: bool = False
    qk_norm: bool = False
    qk_norm_shared: bool = False  # one norm weight [D] for all heads instead of [H, D]
    qk_norm_eps: float = 1e-5
    log_n_length: int = 0  # N: scores times log n_i / log N for the i-th of a document; 0: off
    sink: str = "none"  # a further key of value 0: "zero" has score 0, "learned" one learned score a head
    adaptive_temperature: bool = False  # sharpen rows of high entropy
    window: int = 0  # a query sees the last `window` positions, its own included; 0: all before it

    def validate(self) -> None:
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, got {self.head_dim}; change it or set rope=False")
        if self.window < 0:
            raise ValueError(f"window={self.window} is negative; use 0 for no window")
        if self.qk_norm_shared and not self.qk_norm:
            raise ValueError("qk_norm_shared=True has no effect with qk_norm=False; set qk_norm=True")
        if self.log_n_length < 0 or self.log_n_length == 1:
            raise ValueError(f"log_n_length={self.log_n_length} must be at least 2, or 0 for no scaling")
        if self.alibi and self.adaptive_temperature:
            raise ValueError("adaptive_temperature=True has no form with alibi=True; choose one of them")
        if self.sink not in SINKS:
            raise ValueError(f"sink={self.sink!r} is unknown; choose one of {', '.join(map(repr, SINKS))}")


def alibi_slopes(num_heads: int) -> np.ndarray:
    """m_h [H]: 2^(-8/H), 2^(-16/H), ... for a power of two; otherwise that of the next lower one, then every second
    slope of the next higher one (ALiBi, arXiv 2108.12409, section 3 and its published code)."""

    def of_power(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    lower = 2 ** int(math.log2(num_heads))
    return np.concatenate([of_power(lower), of_power(2 * lower)[::2][: num_heads - lower]])


def log_n_scale(visible: Array, training_length: int) -> Array:
    """r = log n / log N, float32, of rows with n >= 1 visible keys (arXiv 2501.19399 with s = 1 / log N)."""
    return jnp.log(jnp.maximum(visible, 1).astype(jnp.float32)) / math.log(training_length)


@checked
def softmax_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    scale: float | None = None,
    row_scale: Float[Array, "_ T"] | None = None,
    slopes: Float[Array, " H"] | None = None,
    sink: Float[Array, " H"] | None = None,
    adaptive: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"]:
    """Softmax attention over the visible keys, in memory linear in T and S.

    Args:
        q, k, v: any float dtype; K divides H, query head h reads key/value head h // (H / K).
        mask: visibility; causal by default. Rows that see no key give zeros.
        scale: factor of q.k, D ** -0.5 by default.
        row_scale: r_i, [B or 1, T], another factor of q_i.k_j; see `log_n_scale`.
        slopes: m_h >= 0, ALiBi; the mask must be causal.
        sink: z_h, the score of a further key whose value is zero.
        adaptive: multiply each row's scores by a function of its entropy (`adaptive.temperature_of_entropy`), found in
            a first pass. The entropy is that of the visible keys, without the sink; not with slopes.
        implementation: as for `kernels.forgetting.forgetting_attention`, which this is the gate-free case of.

    Returns: o in q's dtype.

    Raises: ValueError for shapes that do not fit, slopes with a mask that is not causal or with adaptive, an unknown
        implementation.
    """
    wide = jnp.promote_types(jnp.float32, q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if row_scale is not None:
        q = (q.astype(wide) * row_scale[..., None, None]).astype(q.dtype)
    decay = None
    if slopes is not None:
        decay = jnp.broadcast_to(-slopes.astype(wide), (*k.shape[:2], q.shape[2]))
    options = {"mask": mask, "scale": scale, "return_lse": True, "implementation": implementation}
    if adaptive and slopes is not None:
        raise ValueError("adaptive=True has no form with slopes (ALiBi); give one of them")
    if adaptive:
        beta = temperature_of_entropy(_row_entropy(q.astype(wide), k.astype(wide), options))
        q = (q.astype(wide) * beta[..., None]).astype(q.dtype)
    o, lse = forgetting_attention(q, k, v, decay, **options)
    if sink is not None:
        lse = jnp.where(lse > -jnp.inf, lse, 0.0)  # such a row is zero already
        o = (o.astype(wide) * jax.nn.sigmoid(lse - sink.astype(wide))[..., None]).astype(o.dtype)
    return o


def _row_entropy(q: Array, k: Array, options: dict) -> Array:
    """Entropy [B, T, H] of every row: lse - sum_j p_j s_j, and sum_j p_j q.k_j = q . (attention with k as values)."""
    mean_key, lse = forgetting_attention(q, k, k, **options)
    mean_score = options["scale"] * jnp.sum(q * mean_key, axis=-1)
    return jnp.where(lse > -jnp.inf, lse, 0.0) - mean_score


@register("softmax")
class SoftmaxAttention(Mixer):
    """Multi-head softmax attention as a mixer; its cache is a `KVCache`, rolling when there is a window."""

    Config: ClassVar[type[MixerConfig]] = SoftmaxConfig
    paper: ClassVar[str] = "Transformer, arXiv 1706.03762"
    masks: ClassVar[tuple[str, ...]] = (*Mixer.masks, "window")
    implementations: ClassVar[tuple] = IMPLEMENTATIONS

    def setup(self):
        c = self.config
        self.query = self.dense(c.num_heads * c.head_dim, "query", c.qkv_bias)
        self.key = self.dense(c.num_kv_heads * c.head_dim, "key", c.qkv_bias)
        self.value = self.dense(c.num_kv_heads * c.head_dim, "value", c.qkv_bias)
        self.out = self.dense(self.hidden_size, "out")
        if c.qk_norm:
            rest = (c.head_dim, c.qk_norm_eps, c.qk_norm_shared, self.param_dtype)
            self.query_norm = head_norm(c.num_heads, *rest, "query_norm")
            self.key_norm = head_norm(c.num_kv_heads, *rest, "key_norm")
        if c.sink == "learned":
            self.sink = self.param("sink", nn.initializers.zeros, (c.num_heads,), self.param_dtype)

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

    def attend(self, q: Array, k: Array, v: Array, mask: Mask, positions: Array) -> Array:
        """o [B, T, H, D]; positions [B or 1, T] of the queries count their document's tokens before them."""
        c = self.config
        visible = jnp.minimum(positions + 1, c.window) if c.window else positions + 1
        sinks = {"none": lambda: None, "zero": lambda: jnp.zeros(c.num_heads), "learned": lambda: self.sink}
        one_row = q.shape[1] == 1  # dense is linear in S then
        return softmax_attention(
            q,
            k,
            v,
            mask=mask,
            row_scale=log_n_scale(visible, c.log_n_length) if c.log_n_length else None,
            slopes=jnp.asarray(alibi_slopes(c.num_heads), jnp.float32) if c.alibi else None,
            sink=sinks[c.sink](),
            adaptive=c.adaptive_temperature,
            implementation=c.implementation or ("reference" if one_row else None),
        )

    def __call__(self, x, *, positions, segments=None, starts=None):
        q, k, v = self.heads(x, positions)
        window = self.config.window or None
        mask = Mask(window=window, q_segments=segments, kv_segments=segments, starts=starts)
        return self.out(merge_heads(self.attend(q, k, v, mask, positions)))

    def init_cache(self, batch, length, starts=None):
        c = self.config
        return kv_cache.init_cache(
            batch, length, c.num_kv_heads, c.head_dim, self.dtype, window=c.window or None, starts=starts
        )

    def prefill(self, x, cache):
        positions = kv_cache.new_positions(cache, x.shape[1])
        q, k, v = self.heads(x, positions)
        (k, v, _, mask), cache = kv_cache.extend(cache, k, v, None, self.config.window or None)
        y = self.out(merge_heads(self.attend(q, k, v, mask, positions)))
        return kv_cache.poison_overflow(y, cache), cache

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        projections = 2 * hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        seen = min(visible, c.window) if c.window else visible
        passes = 2 if c.adaptive_temperature else 1  # the first finds the entropy
        return projections + passes * 2 * 2 * c.num_heads * c.head_dim * seen

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        c = config
        return 2 * kv_cache.slots(length, c.window or None) * c.num_kv_heads * c.head_dim
