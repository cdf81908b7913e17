"""The kinds of Deconstructing Attention (arXiv 2510.11602), each of which drops one principle of softmax attention.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, C channels, h a normed input.

    mlp            no token mixing: o = W_dn (silu(W_gt h) * W_up h)                                     (eq. 4-5)
    approx         form approximated: exp becomes 1 + s + s^2 / 2, see `taylor.py`                       (eq. 6)
    nonapprox      form broken: s_j = silu(q_j).k_j / sqrt(D), o_i = sum_{j<=i} softmax_{j<=i}(s)_j v_j  (eq. 7-8, 18)
    rndemb_qk, fixedseq_qk    no dependence on the input: one learned map for all, see `sourced.py`      (eq. 9-12)
    staticemb_qk   queries and keys not of this layer's input but of the embeddings, see `sourced.py`    (eq. 13)

All have query, key and value projections (`mlp`: an MLP of as many weights) and an output projection, so that a model
has as many parameters with any of them as with `softmax`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from attnlab.attention import kv_cache
from attnlab.attention.heads import head_norm, merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig, register
from attnlab.attention.rotary import rotate
from kernels.masks import Mask
from kernels.prefix_softmax import IMPLEMENTATIONS as PREFIX
from kernels.prefix_softmax import PrefixState, empty_state, prefix_softmax
from kernels.signatures import Array, Float, checked

PAPER = "Deconstructing Attention, arXiv 2510.11602"
MLP_MATCHES = ("square", "four_thirds")
CHUNK = 128  # positions within which the prefix softmax is a matrix product
NORM_ORDERS = ("silu_then_norm", "norm_then_silu")


def choose(option: str, value: str, known: tuple[str, ...]) -> None:
    """ValueError if an option's value is not among the known ones."""
    if value not in known:
        raise ValueError(f"{option}={value!r} is unknown; choose one of {', '.join(known)}")


# --- options -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MLPMixerConfig(MixerConfig):
    qkv_bias: bool = False  # biases of gate, up and down
    mlp_match: str = "square"  # widths; "four_thirds": 4C/3, no output projection, no biases

    def validate(self) -> None:
        choose("mlp_match", self.mlp_match, MLP_MATCHES)
        if self.mlp_match == "four_thirds" and self.qkv_bias:
            raise ValueError("mlp_match='four_thirds' has no biases; set qkv_bias=False")

    def inner(self, hidden_size: int) -> int:
        """Width between the projections: as many weights as query, key and value have, up to rounding."""
        if self.mlp_match == "four_thirds":
            return round(4 * hidden_size / 3)
        return round((self.num_heads + 2 * self.num_kv_heads) * self.head_dim / 3)


@dataclasses.dataclass(frozen=True)
class ProjectionConfig(MixerConfig):
    qkv_bias: bool = False
    qk_norm: bool = False  # RMS norm of every head's query and key, with one weight [D] each (Qwen3)


@dataclasses.dataclass(frozen=True)
class NonApproxConfig(ProjectionConfig):
    scale: float = 0.0  # of the logits; 0: D^-1/2
    norm_order: str = "silu_then_norm"  # of queries, with qk_norm
    logit_softcap: float = 0.0  # s <- cap tanh(s / cap); 0: off

    def validate(self) -> None:
        choose("norm_order", self.norm_order, NORM_ORDERS)
        if self.norm_order != "silu_then_norm" and not self.qk_norm:
            raise ValueError(
                f"norm_order={self.norm_order!r} has no effect without qk_norm; set qk_norm=True"
            )
        if self.scale < 0 or self.logit_softcap < 0:
            raise ValueError(
                f"scale={self.scale} and logit_softcap={self.logit_softcap} must not be negative"
            )


def check_rotation(head_dim: int, rope: bool) -> None:
    """ValueError if heads of this size cannot be rotated but are to be."""
    if rope and head_dim % 2:
        raise ValueError(f"rotary embedding needs an even head_dim, got {head_dim}; change it or turn it off")


# --- pure functions, in the paper's order ------------------------------------------------------------------


@checked
def prefix_logits(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Float[Array, "B S H"]:
    """s_j = scale q_j.k_j (eq. 7, 18), q after SiLU, scale D^-1/2 by default; softcap > 0: softcap tanh(s / softcap).

    At least float32. Query head h meets key head h // (H // K).
    """
    wide = jnp.promote_types(jnp.float32, q.dtype)
    (B, S, H, D), K = q.shape, k.shape[2]
    q, k = q.reshape(B, S, K, H // K, D).astype(wide), k[:, :, :, None].astype(wide)
    s = (D**-0.5 if scale is None else scale) * jnp.sum(q * k, axis=-1).reshape(B, S, H)
    return softcap * jnp.tanh(s / softcap) if softcap else s


@checked
def nonapprox_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    **options,
) -> Array | tuple:
    """o_i = sum_{j <= i} e^{s_j} v_j / sum_{j <= i} e^{s_j} (eq. 8, 18) for the logits of `prefix_logits`.

    Further options and the results, [B, S, H, Dv] first, are those of `kernels.prefix_softmax.prefix_softmax`.
    """
    return prefix_softmax(prefix_logits(q, k, scale=scale, softcap=softcap), v, **options)


# --- modules -----------------------------------------------------------------------------------------------


@struct.dataclass
class Counters:
    """The cache of a mixer that keeps nothing: starts [B] and length [] int32."""

    starts: Array
    length: Array


def new_counters(batch: int, starts: Array | None) -> Counters:
    starts = jnp.zeros(batch, jnp.int32) if starts is None else jnp.asarray(starts, jnp.int32)
    return Counters(starts=starts, length=jnp.zeros((), jnp.int32))


@register("mlp")
class MLPMixer(Mixer):
    """Equations 4-5: an MLP in the place of attention; a token sees itself alone."""

    Config: ClassVar[type[MixerConfig]] = MLPMixerConfig
    paper: ClassVar[str] = PAPER
    masks: ClassVar[tuple[str, ...]] = ("causal", "segments", "left padding")

    def setup(self):
        c, square = self.config, self.config.mlp_match == "square"
        inner = c.inner(self.hidden_size)
        self.gate = self.dense(inner, "gate", c.qkv_bias)
        self.up = self.dense(inner, "up", c.qkv_bias)
        self.down = self.dense(c.num_heads * c.head_dim if square else self.hidden_size, "down", c.qkv_bias)
        if square:
            self.out = self.dense(self.hidden_size, "out")

    def __call__(self, x, *, positions, segments=None, starts=None):
        name = self.config.implementation
        if name not in ("", "reference"):
            raise ValueError(f"implementation={name!r} does not exist; mlp has no other than 'reference'")
        o = self.down(jax.nn.silu(self.gate(x)) * self.up(x))
        return self.out(o) if self.config.mlp_match == "square" else o

    def init_cache(self, batch, length, starts=None):
        return new_counters(batch, starts)

    def prefill(self, x, cache):
        return self(x, positions=None), cache.replace(length=cache.length + x.shape[1])

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c, inner = config, config.inner(hidden_size)
        if c.mlp_match == "four_thirds":
            return 2 * 3 * hidden_size * inner
        heads = c.num_heads * c.head_dim
        return 2 * (2 * hidden_size * inner + inner * heads + heads * hidden_size)

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        return 0


class ProjectedMixer(Mixer):
    """What the kinds below share: the four projections, QK-norm and rotation."""

    paper: ClassVar[str] = PAPER

    def setup(self):
        c = self.config
        self.query = self.dense(c.num_heads * c.head_dim, "query", c.qkv_bias)
        self.key = self.dense(c.num_kv_heads * c.head_dim, "key", c.qkv_bias)
        self.value = self.dense(c.num_kv_heads * c.head_dim, "value", c.qkv_bias)
        self.out = self.dense(self.hidden_size, "out")
        if c.qk_norm:
            rest = (c.head_dim, self.norm_eps, True, self.param_dtype)
            self.query_norm = head_norm(c.num_heads, *rest, "query_norm")
            self.key_norm = head_norm(c.num_kv_heads, *rest, "key_norm")

    def queries_keys(self, x: Array, positions: Array, rope: bool) -> tuple[Array, Array]:
        """q [B, T, H, D] and k [B, T, K, D] of x [B, T, C]: projected, normed, then rotated."""
        c = self.config
        q, k = split_heads(self.query(x), c.num_heads), split_heads(self.key(x), c.num_kv_heads)
        if c.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if rope:
            q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
        return q, k

    def values(self, x: Array) -> Array:
        return split_heads(self.value(x), self.config.num_kv_heads)

    def one_row_is_dense(self, length: int) -> str | None:
        """The implementation as configured, or for one query the dense one, which is linear in S then."""
        return self.config.implementation or ("reference" if length == 1 else None)

    def init_cache(self, batch, length, starts=None):
        c = self.config
        return kv_cache.init_cache(batch, length, c.num_kv_heads, c.head_dim, self.dtype, starts=starts)

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        projections = 2 * hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        return projections + 2 * 2 * c.num_heads * c.head_dim * visible

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        return 2 * length * config.num_kv_heads * config.head_dim


@struct.dataclass
class NonApproxCache:
    """state: sums over the keys so far (m, z [B, H], n [B, H, D], at least float32); starts [B], length [] int32."""

    state: PrefixState
    starts: Array
    length: Array


@register("nonapprox")
class NonApproxAttention(ProjectedMixer):
    """Equations 7, 8 and 18 as a mixer: a recurrence of constant size. Rotation would cancel in q_j . k_j."""

    Config: ClassVar[type[MixerConfig]] = NonApproxConfig
    implementations: ClassVar[tuple] = PREFIX

    def logits(self, x: Array) -> Array:
        """s [B, T, H] of x [B, T, C]."""
        c = self.config
        q, k = split_heads(self.query(x), c.num_heads), split_heads(self.key(x), c.num_kv_heads)
        if c.qk_norm and c.norm_order == "norm_then_silu":
            q = jax.nn.silu(self.query_norm(q))
        else:
            q = jax.nn.silu(q)
            q = self.query_norm(q) if c.qk_norm else q
        k = self.key_norm(k) if c.qk_norm else k
        return prefix_logits(q, k, scale=c.scale or None, softcap=c.logit_softcap)

    def __call__(self, x, *, positions, segments=None, starts=None):
        mask = Mask(q_segments=segments, kv_segments=segments, starts=starts)
        name = self.config.implementation or None
        o = prefix_softmax(self.logits(x), self.values(x), mask=mask, implementation=name)
        return self.out(merge_heads(o))

    def init_cache(self, batch, length, starts=None):
        c, counters = self.config, new_counters(batch, starts)
        state = empty_state(batch, c.num_heads, c.head_dim, jnp.promote_types(jnp.float32, self.dtype))
        return NonApproxCache(state=state, starts=counters.starts, length=counters.length)

    def prefill(self, x, cache):
        o, state = prefix_softmax(
            self.logits(x),
            self.values(x),
            mask=Mask(starts=cache.starts - cache.length),
            initial_state=cache.state,
            return_state=True,
            implementation=self.config.implementation or None,
        )
        cache = cache.replace(state=state, length=cache.length + x.shape[1])
        return self.out(merge_heads(o)), cache

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        projections = 2 * hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        return projections + 2 * c.num_heads * c.head_dim * min(visible, CHUNK)

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        return config.num_heads * (config.head_dim + 2)
