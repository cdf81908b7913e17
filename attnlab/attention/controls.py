"""Controls to Deconstructing Attention (arXiv 2510.11602): how far does one get with less than attention?

Letters: B batch, T length, H heads, K value heads, D head size, C channels; t a query, j a key of its document.

    identity      y = 0                                                        no mixing, no parameters
    uniform       o_t = mean_{j<=t} v_j                                        a map that is always the same
    frozen_qk     softmax attention, queries and keys as drawn, never trained            arXiv 2506.01115
    aft_simple    o_t = sigmoid(q_t) * sum_{j<=t} e^{k_j} v_j / sum_{j<=t} e^{k_j}       AFT, arXiv 2105.14103, eq. 3
                  per channel: no heads, no map

Further controls have tables over positions: `synthesizer.py`, `position_mixing.py`.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from attnlab.attention.deconstructed import new_counters
from attnlab.attention.heads import merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig, register
from attnlab.attention.softmax import SoftmaxAttention, SoftmaxConfig
from kernels.masks import Mask
from kernels.prefix_softmax import (
    IMPLEMENTATIONS,
    PrefixState,
    default_chunk_size,
    empty_state,
    prefix_softmax,
)
from kernels.signatures import Array, Float, checked

PAPER = "control to arXiv 2510.11602"


# --- options -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class UngroupedConfig(MixerConfig):
    """Options of a mixer without key/value heads: it refuses a number of them, whatever other layers have."""

    def resolve(self, num_heads: int, num_kv_heads: int, head_dim: int, hidden_size: int) -> MixerConfig:
        if self.num_kv_heads not in (0, self.num_heads or num_heads):
            raise ValueError(f"num_kv_heads={self.num_kv_heads} means nothing to a mixer without key/value heads; "
                             "leave it 0")  # fmt: skip
        return super().resolve(num_heads, 0, head_dim, hidden_size)


@dataclasses.dataclass(frozen=True)
class IdentityConfig(UngroupedConfig):
    def validate(self) -> None:
        if self.implementation:
            raise ValueError(
                f"implementation={self.implementation!r} does not exist for identity, which computes nothing"
            )


@dataclasses.dataclass(frozen=True)
class UniformConfig(MixerConfig):
    qkv_bias: bool = False  # of the values


@dataclasses.dataclass(frozen=True)
class AFTSimpleConfig(UngroupedConfig):
    """H D channels in all; AFT has no heads."""

    qkv_bias: bool = False


# --- pure functions ----------------------------------------------------------------------------------------


@checked
def uniform_attention(v: Float[Array, "B S K Dv"], **options) -> Array | tuple:
    """Mean of the values so far, [B, S, K, Dv]; options and further results of `kernels.prefix_softmax`."""
    return prefix_softmax(jnp.zeros(v.shape[:3], jnp.promote_types(jnp.float32, v.dtype)), v, **options)


@checked
def aft_simple(
    q: Float[Array, "B S E"], k: Float[Array, "B S E"], v: Float[Array, "B S E"], **options
) -> Array | tuple:
    """AFT-simple over E channels, q before its sigmoid; [B, S, E] in v's dtype.

    Options and further results are those of `kernels.prefix_softmax`, where every channel is a head of size 1.
    """
    results = prefix_softmax(k, v[..., None], **options)
    o, *rest = results if isinstance(results, tuple) else (results,)
    gate = jax.nn.sigmoid(q.astype(jnp.promote_types(jnp.float32, q.dtype)))
    y = (gate * o[..., 0]).astype(v.dtype)
    return (y, *rest) if rest else y


# --- modules -----------------------------------------------------------------------------------------------


@struct.dataclass
class PrefixCache:
    """state: sums over the keys so far, m and z [B, heads], n [B, heads, size]; starts [B] and length [] int32."""

    state: PrefixState
    starts: Array
    length: Array


@register("identity")
class Identity(Mixer):
    """Adds nothing to the residual stream."""

    Config: ClassVar[type[MixerConfig]] = IdentityConfig
    paper: ClassVar[str] = PAPER
    masks: ClassVar[tuple[str, ...]] = ("causal", "segments", "left padding")

    def __call__(self, x, *, positions, segments=None, starts=None):
        return jnp.zeros_like(x)

    def init_cache(self, batch, length, starts=None):
        return new_counters(batch, starts)

    def prefill(self, x, cache):
        return jnp.zeros_like(x), cache.replace(length=cache.length + x.shape[1])

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        return 0.0

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        return 0


class PrefixMixer(Mixer):
    """What `uniform` and `aft_simple` share: one pass of prefix softmax, decoded from its state."""

    paper: ClassVar[str] = PAPER
    implementations: ClassVar[tuple] = IMPLEMENTATIONS

    def mix(self, x: Array, **options) -> Array | tuple:
        """o [B, T, H D] of x [B, T, C], or the tuple of it and the state; options of `kernels.prefix_softmax`."""
        raise NotImplementedError

    def state_shape(self) -> tuple[int, int]:
        """Heads and value size of the prefix softmax."""
        raise NotImplementedError

    def __call__(self, x, *, positions, segments=None, starts=None):
        mask = Mask(q_segments=segments, kv_segments=segments, starts=starts)
        return self.out(self.mix(x, mask=mask, implementation=self.config.implementation or None))

    def init_cache(self, batch, length, starts=None):
        counters, wide = new_counters(batch, starts), jnp.promote_types(jnp.float32, self.dtype)
        return PrefixCache(empty_state(batch, *self.state_shape(), wide), counters.starts, counters.length)

    def prefill(self, x, cache):
        o, state = self.mix(
            x,
            mask=Mask(starts=cache.starts - cache.length),
            initial_state=cache.state,
            return_state=True,
            implementation=self.config.implementation or None,
        )
        return self.out(o), cache.replace(state=state, length=cache.length + x.shape[1])


@register("uniform")
class UniformAttention(PrefixMixer):
    """Running means of the values, the same weight for every token so far."""

    Config: ClassVar[type[MixerConfig]] = UniformConfig

    def setup(self):
        c = self.config
        self.value = self.dense(c.num_kv_heads * c.head_dim, "value", c.qkv_bias)
        self.out = self.dense(self.hidden_size, "out")

    def state_shape(self):
        return self.config.num_kv_heads, self.config.head_dim

    def mix(self, x, **options):
        c = self.config
        results = uniform_attention(split_heads(self.value(x), c.num_kv_heads), **options)
        o, *rest = results if isinstance(results, tuple) else (results,)
        o = merge_heads(jnp.repeat(o, c.num_heads // c.num_kv_heads, axis=2))
        return (o, *rest) if rest else o

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        projections = 2 * hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
        within = min(visible, default_chunk_size(c.head_dim))  # keys of the same chunk
        return projections + 2 * c.num_kv_heads * c.head_dim * within

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        return config.num_kv_heads * (config.head_dim + 2)


@register("aft_simple")
class AFTSimple(PrefixMixer):
    """Attention-free: every channel averages its values by the exponentials of its keys."""

    Config: ClassVar[type[MixerConfig]] = AFTSimpleConfig
    paper: ClassVar[str] = "AFT-simple, arXiv 2105.14103"
    masks: ClassVar[tuple[str, ...]] = ("causal", "segments", "left padding")

    def setup(self):
        c = self.config
        width = c.num_heads * c.head_dim
        self.query = self.dense(width, "query", c.qkv_bias)
        self.key = self.dense(width, "key", c.qkv_bias)
        self.value = self.dense(width, "value", c.qkv_bias)
        self.out = self.dense(self.hidden_size, "out")

    def state_shape(self):
        return self.config.num_heads * self.config.head_dim, 1

    def mix(self, x, **options):
        return aft_simple(self.query(x), self.key(x), self.value(x), **options)

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        width = config.num_heads * config.head_dim
        return 2 * 4 * hidden_size * width + 2 * width * min(visible, default_chunk_size(1))

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        return 3 * config.num_heads * config.head_dim


class FrozenDense(nn.Dense):
    """A projection whose weights are constants to gradients, which go through to its input."""

    def param(self, *args, **kwargs):
        return jax.lax.stop_gradient(super().param(*args, **kwargs))


@register("frozen_qk")
class FrozenQKAttention(SoftmaxAttention):
    """Softmax attention whose query and key projections stay as drawn; all options of `softmax`."""

    Config: ClassVar[type[MixerConfig]] = SoftmaxConfig
    paper: ClassVar[str] = "Frozen-QK, arXiv 2506.01115"

    def dense(self, features: int, name: str, use_bias: bool = False) -> nn.Dense:
        if name not in ("query", "key"):
            return super().dense(features, name, use_bias)
        return FrozenDense(
            features,
            use_bias=use_bias,
            name=f"frozen_{name}",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(self.init_std),
        )
