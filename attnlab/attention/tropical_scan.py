"""Tropical attention in linear time with a state of constant size: two causal mixers.

Letters: B batch, T length, H query heads, K key/value heads, D head size, C channels; a log-decay, g an output gate.

    tropical_linear   M_t = max(a_t + M_{t-1}, k_t + v_t^T),  c_t = max_d' (q_td' + M_t[d', :])       state [B, K, D, D]
                      tropical attention with the score max_d (q_id + k_jd), which factorises
    tropical_scan     h_t = max(a_t + h_{t-1}, v_t),  o_t = expm1(min(h_t, clip)) g_t                 state [B, H, D]
                      its distance is the decay that has passed instead of a metric
    a_t = -softplus(W_a x_t + b_a) <= 0,   g_t = sigmoid(W_g x_t)
Ours: extensions of arXiv 2505.17190, which has no causal form.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from attnlab.attention.heads import split_heads
from attnlab.attention.mixer import MixerConfig, register
from attnlab.attention.tropical_heads import (
    RotaryTropicalConfig,
    TropicalHeads,
    TropicalHeadsConfig,
    head_slopes,
    inverse_softplus,
    map_flops,
)
from kernels.masks import Mask
from kernels.tropical import linear, maxplus_linear_attention, maxplus_scan, scan

__all__ = [
    "TropicalLinearConfig",
    "TropicalLinearMixer",
    "TropicalScanConfig",
    "TropicalScanMixer",
    "TropicalState",
    "maxplus_linear_attention",
    "maxplus_scan",
]

Array = jax.Array
DECAYS = ("learned", "fixed", "none")


@struct.dataclass
class TropicalState:
    """state [B, K, D, D] or [B, H, D] float32, -inf before the first token; starts [B] and length [] int32.

    `starts` is the number of left-padding positions of a row; `length` counts all positions seen, pads included.
    """

    state: Array
    starts: Array
    length: Array


def _empty(shape: tuple[int, ...], dtype, starts: Array | None) -> TropicalState:
    starts = jnp.zeros(shape[0], jnp.int32) if starts is None else jnp.asarray(starts, jnp.int32)
    return TropicalState(jnp.full(shape, -jnp.inf, dtype), starts, jnp.zeros((), jnp.int32))


class RecurrentTropicalHeads(TropicalHeads):
    """What both mixers do with their state: `scan(x, positions, mask, state)` gives y and the next one."""

    def scan(self, x: Array, positions: Array, mask: Mask, state: Array | None, kernel: str | None):
        raise NotImplementedError

    def __call__(self, x, *, positions, segments=None, starts=None):
        mask = Mask(q_segments=segments, kv_segments=segments, starts=starts)
        return self.scan(x, positions, mask, None, self.kernel)[0]

    def prefill(self, x, cache):
        T = x.shape[1]
        positions = cache.length + jnp.arange(T, dtype=jnp.int32)[None] - cache.starts[:, None]
        mask = Mask(starts=cache.starts - cache.length)
        y, state = self.scan(
            x, positions, mask, cache.state, self.kernel or ("reference" if T == 1 else None)
        )
        return y, cache.replace(state=state, length=cache.length + T)


@dataclasses.dataclass(frozen=True)
class TropicalLinearConfig(RotaryTropicalConfig):
    decay: str = "learned"  # a from the input, a key/value head; "fixed": 2^(-8 h / K) a position; "none"

    def validate(self) -> None:
        super().validate()
        if self.decay not in DECAYS:
            raise ValueError(f"decay={self.decay!r} is unknown; choose one of {DECAYS}")


@register("tropical_linear")
class TropicalLinearMixer(RecurrentTropicalHeads):
    """Max-plus linear attention; the cache is M and has no end."""

    Config: ClassVar[type[MixerConfig]] = TropicalLinearConfig
    paper: ClassVar[str] = "Tropical Attention, arXiv 2505.17190 (linear-time extension)"
    masks: ClassVar[tuple[str, ...]] = ("causal", "segments", "left padding", "grouped heads")
    implementations: ClassVar[tuple] = linear.IMPLEMENTATIONS

    def setup(self):
        c, K = self.config, self.config.num_kv_heads
        self.setup_attention()
        self.setup_maps({"query": c.num_heads, "key": K, "value": K})
        if c.decay == "learned":
            self.decay = self.wide_dense(K, "decay", inverse_softplus(head_slopes(K)))

    def log_decay(self, x: Array) -> Array | None:
        """a [B, T, K] of x [B, T, C], or None without decay."""
        if self.config.decay == "none":
            return None
        if self.config.decay == "learned":
            return -jax.nn.softplus(self.decay(x))
        fixed = -jnp.asarray(head_slopes(self.config.num_kv_heads), self.wide)
        return jnp.broadcast_to(fixed, (*x.shape[:2], fixed.size))

    def scan(self, x, positions, mask, state, kernel):
        q, k, v = self.project(x, positions)
        q, k, v = self.to_log_space(q, "query"), self.to_log_space(k, "key"), self.to_log_space(v, "value")
        c, state = maxplus_linear_attention(
            q,
            k,
            v,
            self.log_decay(x),
            initial_state=state,
            mask=mask,
            return_state=True,
            implementation=kernel,
        )
        return self.readout(self.from_log_space(c)), state

    def init_cache(self, batch, length, starts=None):
        c = self.config
        return _empty((batch, c.num_kv_heads, c.head_dim, c.head_dim), self.wide, starts)

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        """Matrix products, and the additions and comparisons that take their place in max-plus algebra."""
        c, H, K, D = config, config.num_heads, config.num_kv_heads, config.head_dim
        projections = 2 * hidden_size * (D * (2 * H + 2 * K) + K * (c.decay == "learned"))
        return projections + map_flops(c, H + 2 * K) + 2 * H * D * D + 3 * K * D * D

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        return config.num_kv_heads * config.head_dim**2


@dataclasses.dataclass(frozen=True)
class TropicalScanConfig(TropicalHeadsConfig):
    memory_min: float = (
        2.0  # tokens in which a channel's state falls by 1 at the start of training, log-spaced over
    )
    memory_max: float = 256.0  # the channels of a head between these two

    def validate(self) -> None:
        super().validate()
        if not 0 < self.memory_min <= self.memory_max:
            raise ValueError(
                f"memory_min={self.memory_min} and memory_max={self.memory_max} must satisfy 0 < min <= max"
            )
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"tropical_scan has no queries to group, got num_kv_heads={self.num_kv_heads} beside "
                f"num_heads={self.num_heads}; make them equal"
            )


@register("tropical_scan")
class TropicalScanMixer(RecurrentTropicalHeads):
    """A running maximum with decay of each channel, gated; the cache is h and has no end."""

    Config: ClassVar[type[MixerConfig]] = TropicalScanConfig
    paper: ClassVar[str] = "Tropical Attention, arXiv 2505.17190 (diagonal scan)"
    masks: ClassVar[tuple[str, ...]] = ("causal", "segments", "left padding")
    implementations: ClassVar[tuple] = scan.IMPLEMENTATIONS

    def setup(self):
        c = self.config
        size = c.num_heads * c.head_dim
        self.value = self.dense(size, "value")
        memory = np.exp(np.linspace(np.log(c.memory_min), np.log(c.memory_max), c.head_dim))
        self.decay = self.wide_dense(size, "decay", inverse_softplus(np.tile(1 / memory, c.num_heads)))
        self.output_gate = self.dense(size, "output_gate")
        self.setup_maps({"value": c.num_heads})
        self.setup_output()

    @property
    def map_kernel(self) -> str | None:
        return None if self.kernel == "associative" else self.kernel  # a form of the scan only

    def scan(self, x, positions, mask, state, kernel):
        H = self.config.num_heads
        v = self.to_log_space(split_heads(self.value(x), H), "value")
        a = -jax.nn.softplus(split_heads(self.decay(x), H))
        h, state = maxplus_scan(a, v, state, mask=mask, return_state=True, implementation=kernel)
        gate = jax.nn.sigmoid(split_heads(self.output_gate(x), H).astype(h.dtype))
        return self.readout(self.from_log_space(h) * gate), state

    def init_cache(self, batch, length, starts=None):
        c = self.config
        return _empty((batch, c.num_heads, c.head_dim), self.wide, starts)

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        """Matrix products, and the additions and comparisons of the max-plus map and of the scan."""
        size = config.num_heads * config.head_dim
        return 2 * hidden_size * size * 4 + map_flops(config, config.num_heads) + 2 * size

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        return config.num_heads * config.head_dim
