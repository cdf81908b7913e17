"""Native Hybrid Attention (NHA), arXiv 2510.07019: one softmax over gated memory slots and a window of exact tokens.

The slots are those of Gated Slot Attention (arXiv 2409.07146). A token enters them when it leaves the window, so each
past token is in exactly one of the two memories. window=0 is gated slot attention, a window of the whole length softmax
attention, and a layer pattern with several windows the paper's inter-layer hybrid.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size of q and k, Dv of v, C channels, M
slots, W window, n slot shift, R = max(W, n) tokens of the decode cache, w taps of a short convolution; e = t - n.

    g_t = log sigmoid(W_f x_t) / tau                                         `slot_log_gates`
    K_t = diag(exp g_e) K_{t-1} + (1 - exp g_e) k_e^T,   V_t likewise        kernels.slots
    o_t = softmax([K_t q_t ; R_t q_t . R_j k_j] / sqrt(D)) [V_t ; v_j]       `native_hybrid_attention` (R: rotary)
        = sigmoid(L_s - L_w) o_s + sigmoid(L_w - L_s) o_w                    `merge_branches`
    y_t = W_o norm(silu(o_t)),  v = silu(W_v x)                              `NativeHybridAttention`, style "scratch"
    y_t = W_o o_t                                                            style "converted", of a pretrained model
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from attnlab.attention.heads import head_norm, merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig, register
from attnlab.attention.norm import RMSNorm
from attnlab.attention.rotary import rotate
from kernels.forgetting import forgetting_attention
from kernels.masks import Mask
from kernels.signatures import Array, Float, Int, checked
from kernels.slots import IMPLEMENTATIONS, SlotState, slot_attention
from kernels.streaming.merge import merge

STYLES = ("scratch", "converted")
FEATURE_MAPS = {"identity": lambda x: x, "swish": jax.nn.silu, "relu": jax.nn.relu}
EMPTY_SLOTS = ("sink", "mask")


@dataclasses.dataclass(frozen=True)
class NativeHybridConfig(MixerConfig):
    style: str = "scratch"  # "scratch": silu on values, silu and norm on the output; "converted": neither
    window: int = 32  # W, the row's own token included; 0: slots only
    slots: int = 64  # M, a key/value head
    slot_shift: int = -1  # n: a token enters the slots n steps after it was read; -1: the window's size
    tau: float = 8.0  # damping of the gates: alpha = sigmoid(f)^(1/tau)
    log_gate_min: float = -math.inf  # lower clamp of the log gates; the paper has none
    empty_slots: str = "sink"  # slots not written yet: "sink" logit 0 and value 0, "mask" absent
    learned_slots: bool = False  # a learned initial state instead of zeros
    slot_feature_map: str = "identity"  # of the slots' queries and keys: "identity", "swish" or "relu"
    value_dim: int = 0  # Dv; 0: head_dim
    conv_size: int = (
        0  # w: causal depthwise convolution with silu on query, key and value; 0: none, the paper's 4
    )
    rope_theta: float = 10_000.0  # rotary positions, in the window only
    qkv_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head's queries and keys, before both memories
    qk_norm_shared: bool = False  # one norm weight [D] for all heads instead of [H, D]
    qk_norm_eps: float = 1e-6
    output_norm_eps: float = 1e-5  # of style "scratch"

    def validate(self) -> None:
        for name, allowed in (
            ("style", STYLES),
            ("slot_feature_map", FEATURE_MAPS),
            ("empty_slots", EMPTY_SLOTS),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(map(repr, allowed))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {known}")
        for name, least in (
            ("window", 0),
            ("slots", 1),
            ("slot_shift", -1),
            ("value_dim", 0),
            ("conv_size", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.conv_size == 1:
            raise ValueError("conv_size=1 mixes no tokens; use 0 for no convolution or at least 2 taps")
        if self.window and self.head_dim % 2:
            raise ValueError(
                f"rotary positions need an even head_dim, got {self.head_dim}; change it or use window=0"
            )
        if not self.tau > 0 or not self.log_gate_min < 0:
            raise ValueError(f"tau={self.tau} must be positive and log_gate_min={self.log_gate_min} negative")
        if self.style == "converted" and self.output_norm_eps != NativeHybridConfig.output_norm_eps:
            raise ValueError(
                f"output_norm_eps={self.output_norm_eps} has no effect with style='converted'; use style='scratch'"
            )
        if self.qk_norm_shared and not self.qk_norm:
            raise ValueError("qk_norm_shared=True has no effect with qk_norm=False; set qk_norm=True")

    @property
    def shift(self) -> int:
        """n."""
        return self.window if self.slot_shift < 0 else self.slot_shift

    @property
    def kept(self) -> int:
        """R: tokens whose keys, values and gates the decode cache holds."""
        return max(self.window, self.shift)

    @property
    def values(self) -> int:
        """Dv."""
        return self.value_dim or self.head_dim


def slot_log_gates(logits: Array, tau: float = 8.0, log_gate_min: float = -math.inf) -> Array:
    """g = log sigmoid(logits) / tau, not below log_gate_min, in float32 (float64 for float64 logits). Any shape.

    Section 2.2: alpha = exp(g) is what a slot keeps when a token enters, 1 - alpha what it takes of the token.
    """
    g = jax.nn.log_sigmoid(logits.astype(jnp.promote_types(jnp.float32, logits.dtype))) / tau
    return jnp.maximum(g, log_gate_min) if log_gate_min > -math.inf else g


@checked
def native_hybrid_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    log_gates: Float[Array, "B S K M"],
    *,
    window: int,
    positions: Int[Array, "_ T"] | None = None,
    key_positions: Int[Array, "_ S"] | None = None,
    rope_theta: float = 10_000.0,
    slot_feature_map: str = "identity",
    **options: Any,
):
    """The paper's operator (section 2.1): `kernels.slots.slot_attention` with rotary positions in the window.

    q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] without positions, of one float dtype; log_gates [B, S, K, M]
    float32, see `slot_log_gates`. positions [B or 1, T] int32 of the queries, 0..T-1 by default; key_positions
    [B or 1, S], by default those of the queries. `options` are those of `slot_attention`: mask, slot_shift,
    empty_slots, initial_state, document_state, scale, return_state, return_lse, return_branch_lse, implementation,
    chunk_sizes.

    Returns o [B, T, H, Dv] in q's dtype, and what the options ask for. ValueError for an odd D with a window, S != T
    without key_positions, an unknown feature map, and what `slot_attention` refuses.
    """
    if slot_feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"{slot_feature_map=} is unknown; choose one of {', '.join(map(repr, FEATURE_MAPS))}"
        )
    phi = FEATURE_MAPS[slot_feature_map]
    rotated = {}
    if window:
        q_positions = jnp.arange(q.shape[1])[None] if positions is None else positions
        if key_positions is None and k.shape[1] != q.shape[1]:
            raise ValueError(f"key_positions are needed for {k.shape[1]} keys and {q.shape[1]} queries")
        k_positions = q_positions if key_positions is None else key_positions
        rotated = {
            "q_window": rotate(q, q_positions, rope_theta),
            "k_window": rotate(k, k_positions, rope_theta),
        }
    return slot_attention(phi(q), phi(k), v, log_gates, window=window, **rotated, **options)


def slot_branch(q, k, v, log_gates, *, slot_shift: int, **options) -> tuple[Array, Array]:
    """Softmax over the slots alone, o_s [B, T, H, Dv] and L_s [B, T, H]; options as for the joint form."""
    return native_hybrid_attention(
        q, k, v, log_gates, window=0, slot_shift=slot_shift, return_lse=True, **options
    )


def window_branch(q, k, v, *, window: int, positions=None, rope_theta=10_000.0, mask=Mask(), **options):  # noqa: B008
    """Softmax over the window alone, o_w [B, T, H, Dv] and L_w [B, T, H]; options: scale, implementation."""
    positions = jnp.arange(q.shape[1])[None] if positions is None else positions
    q, k = rotate(q, positions, rope_theta), rotate(k, positions, rope_theta)
    mask = dataclasses.replace(mask, window=window)
    return forgetting_attention(q, k, v, mask=mask, return_lse=True, **options)


def merge_branches(
    o_slots: Array, lse_slots: Array, o_window: Array, lse_window: Array
) -> tuple[Array, Array]:
    """The joint softmax from its two branches (section 2.7), exactly: o [B, T, H, Dv] and L [B, T, H].

    L = log(exp L_s + exp L_w), o = sigmoid(L_s - L_w) o_s + sigmoid(L_w - L_s) o_w; o is in o_slots' dtype.
    """
    return merge(o_slots, lse_slots, o_window, lse_window)


def slot_mass(lse_slots: Array, lse_window: Array) -> Array:
    """Share of the attention that goes to the slots, sigmoid(L_s - L_w), [B, T, H]; 0 where nothing is seen."""
    blind = (lse_slots == -jnp.inf) & (lse_window == -jnp.inf)
    return jnp.where(
        blind, 0, jax.nn.sigmoid(jnp.where(blind, 0, lse_slots) - jnp.where(blind, 0, lse_window))
    )


def slot_mass_loss(lse_slots: Array, lse_window: Array, target: float = 1.0) -> Array:
    """Auxiliary loss (section 2.7): mean cross-entropy of the slots' share with `target`; a scalar.

    The window's side is held fixed, so the loss moves the slots only. Rows to which a memory shows nothing do not
    count.
    """
    both = (lse_slots > -jnp.inf) & (lse_window > -jnp.inf)
    logit = jnp.where(both, lse_slots, 0) - jax.lax.stop_gradient(jnp.where(both, lse_window, 0))
    losses = jax.nn.softplus(logit) - target * logit
    return jnp.sum(jnp.where(both, losses, 0)) / jnp.maximum(jnp.sum(both), 1)


def short_convolution(x: Array, kernel: Array, before: Array, documents: Array) -> Array:
    """silu(sum_i kernel[w-1-i] x_{t-i}), causal and channel by channel, within a document.

    x [B, T, C]; kernel [w, C], the last tap for the current token; before [B, w-1, C] are the tokens before x;
    documents [B, w-1+T] numbers all of them, and taps of another document, or of 0, count nothing.
    """
    w, T = kernel.shape[0], x.shape[1]
    wide = jnp.promote_types(jnp.float32, x.dtype)
    line = jnp.concatenate([before.astype(x.dtype), x], axis=1).astype(wide)
    own = documents[:, w - 1 :]
    taps = (
        jnp.where(((documents[:, i : i + T] == own) & (own != 0))[..., None], line[:, i : i + T], 0)
        for i in range(w)
    )
    return jax.nn.silu(sum(tap * kernel[i].astype(wide) for i, tap in enumerate(taps))).astype(x.dtype)


@struct.dataclass
class SlotCache:
    """Constant memory, whatever the length. All arrays hold the newest token last.

    key_slots [B, K, M, D], value_slots [B, K, M, Dv] float32: tokens up to length - 1 - n; key [B, R, K, D] without
    positions, value [B, R, K, Dv], log_gates [B, R, K, M] float32: the last R tokens; tails: the last w - 1 inputs of
    the query, key and value convolutions, or None; starts [B], length [] int32 as in `KVCache`.
    """

    key_slots: Array
    value_slots: Array
    key: Array
    value: Array
    log_gates: Array
    tails: tuple[Array, Array, Array] | None
    starts: Array
    length: Array


def init_slots(
    batch: int, kept: int, kv_heads: int, slots: int, dim: int, value_dim: int, dtype, *, starts=None
) -> SlotCache:
    """An empty cache that keeps the last `kept` = max(W, n) tokens exactly; starts [B] counts left padding."""
    wide = jnp.promote_types(jnp.float32, dtype)
    return SlotCache(
        key_slots=jnp.zeros((batch, kv_heads, slots, dim), wide),
        value_slots=jnp.zeros((batch, kv_heads, slots, value_dim), wide),
        key=jnp.zeros((batch, kept, kv_heads, dim), dtype),
        value=jnp.zeros((batch, kept, kv_heads, value_dim), dtype),
        log_gates=jnp.zeros((batch, kept, kv_heads, slots), wide),
        tails=None,
        starts=jnp.zeros(batch, jnp.int32) if starts is None else jnp.asarray(starts, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def extend_slots(
    cache: SlotCache, q: Array, k: Array, v: Array, log_gates: Array, *, window: int, slot_shift: int | None = None,
    initial_state: SlotState | None = None, **options,
) -> tuple[Array, tuple[Array, Array], SlotCache]:  # fmt: skip
    """Append T tokens (section 2.8): their outputs [B, T, H, Dv], (L_s, L_w) [B, T, H] each, and the new cache.

    Operands as in `native_hybrid_attention`, positions apart: the cache counts them. The kept tokens come first, as
    keys without queries. initial_state is what the slots hold before the first token of all; `options` are those of
    the operator.
    """
    T, kept = q.shape[1], cache.key.shape[1]
    n = window if slot_shift is None else slot_shift
    if kept != max(window, n):
        raise ValueError(
            f"a cache of {kept} tokens does not serve {window=} and slot_shift={n}; keep their maximum"
        )
    k, v, log_gates = (
        jnp.concatenate([old, new.astype(old.dtype)], axis=1)
        for old, new in ((cache.key, k), (cache.value, v), (cache.log_gates, log_gates))
    )
    starts = jnp.maximum(cache.starts, 0)
    first = cache.length - kept  # position of the first key, pads counted
    positions = first + jnp.arange(kept + T, dtype=jnp.int32)[None] - cache.starts[:, None]
    o, state, branches = native_hybrid_attention(
        q, k, v, log_gates, window=window, slot_shift=n, positions=positions[:, kept:], key_positions=positions,
        mask=Mask(q_offset=kept, starts=starts - first), initial_state=_slots_of(cache, n, initial_state),
        return_state=True, return_branch_lse=True, **options,
    )  # fmt: skip
    cache = cache.replace(
        key_slots=state.key, value_slots=state.value, key=k[:, T:], value=v[:, T:], log_gates=log_gates[:, T:],
        length=cache.length + T,
    )  # fmt: skip
    return o, branches, cache


def _slots_of(cache: SlotCache, n: int, initial: SlotState | None) -> SlotState:
    """The state before the next token. A given initial one enters here: an empty cache knows no parameters."""
    if initial is None:
        entered = cache.length - n > jnp.maximum(cache.starts, 0)
        return SlotState(cache.key_slots, cache.value_slots, entered)
    pairs = ((initial.key, cache.key_slots), (initial.value, cache.value_slots))
    return SlotState(*(jnp.where(cache.length == 0, new.astype(old.dtype), old) for new, old in pairs))


@register("native_hybrid")
class NativeHybridAttention(Mixer):
    """The NHA layer. The share of attention on the slots and `slot_mass_loss` are sown into "intermediates"."""

    Config: ClassVar[type[MixerConfig]] = NativeHybridConfig
    paper: ClassVar[str] = "Native Hybrid Attention, arXiv 2510.07019"
    masks: ClassVar[tuple[str, ...]] = ("causal", "segments", "left padding", "window", "grouped heads")
    implementations: ClassVar[tuple] = IMPLEMENTATIONS

    def setup(self):
        c = self.config
        self.query = self.dense(c.num_heads * c.head_dim, "query", c.qkv_bias)
        self.key = self.dense(c.num_kv_heads * c.head_dim, "key", c.qkv_bias)
        self.value = self.dense(c.num_kv_heads * c.values, "value", c.qkv_bias)
        self.out = self.dense(self.hidden_size, "out")
        wide = jnp.promote_types(jnp.float32, self.dtype)
        # Gates act as products over many tokens, so their logits are float32 whatever the compute dtype.
        self.forget_gate = nn.Dense(
            c.num_kv_heads * c.slots, use_bias=False, name="forget_gate", dtype=wide, param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(self.init_std),
        )  # fmt: skip
        if c.qk_norm:
            rest = (c.head_dim, c.qk_norm_eps, c.qk_norm_shared, self.param_dtype)
            self.query_norm = head_norm(c.num_heads, *rest, "query_norm")
            self.key_norm = head_norm(c.num_kv_heads, *rest, "key_norm")
        if c.style == "scratch":
            shape = (c.num_heads * c.values,)
            self.output_norm = RMSNorm(shape, c.output_norm_eps, self.param_dtype, name="output_norm")
        if c.conv_size:
            near = nn.initializers.uniform(2 * c.conv_size**-0.5)
            centred = lambda *a: near(*a) - c.conv_size**-0.5  # noqa: E731
            self.convs = [
                self.param(f"{name}_conv", centred, (c.conv_size, width), self.param_dtype)
                for name, width in zip(("query", "key", "value"), self._widths(), strict=True)
            ]
        if c.learned_slots:
            init = nn.initializers.normal(self.init_std)
            sizes = {"key": c.head_dim, "value": c.values}
            self.initial_slots = [
                self.param(f"initial_{name}_slots", init, (c.num_kv_heads, c.slots, size), self.param_dtype)
                for name, size in sizes.items()
            ]

    def _widths(self) -> tuple[int, int, int]:
        """Channels of queries, keys and values."""
        c = self.config
        return c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.values

    def heads(self, x: Array, tails: tuple, documents: Array | None):
        """q, k, v and log gates [B, T, heads, .] of x [B, T, C] without positions, and the new tails."""
        c = self.config
        lines = [self.query(x), self.key(x), self.value(x)]
        if c.conv_size:
            joined = [jnp.concatenate([a.astype(b.dtype), b], 1) for a, b in zip(tails, lines, strict=True)]
            lines = [
                short_convolution(line, kernel, tail, documents)
                for line, kernel, tail in zip(lines, self.convs, tails, strict=True)
            ]
            tails = tuple(line[:, -(c.conv_size - 1) :] for line in joined)
        q, k, v = (
            split_heads(y, n)
            for y, n in zip(lines, (c.num_heads, c.num_kv_heads, c.num_kv_heads), strict=True)
        )
        if c.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if c.style == "scratch":
            v = jax.nn.silu(v)
        g = slot_log_gates(split_heads(self.forget_gate(x), c.num_kv_heads), c.tau, c.log_gate_min)
        return q, k, v, g, tails

    def readout(self, o: Array) -> Array:
        """o [B, T, H, Dv] -> y [B, T, C]."""
        o = merge_heads(o)
        return self.out(self.output_norm(jax.nn.silu(o)) if self.config.style == "scratch" else o)

    def _options(self) -> dict[str, Any]:
        """Options of the operator that training and decoding share."""
        names = ("window", "rope_theta", "empty_slots", "slot_feature_map")
        return {name: getattr(self.config, name) for name in names}

    def _sow(self, branches: tuple[Array, Array]) -> None:
        self.sow("intermediates", "slot_mass", slot_mass(*branches))
        self.sow("intermediates", "slot_mass_loss", slot_mass_loss(*branches))

    def _initial_state(self, batch: int) -> SlotState | None:
        if not self.config.learned_slots:
            return None
        return SlotState(*(jnp.broadcast_to(x, (batch, *x.shape)) for x in self.initial_slots))

    def __call__(self, x, *, positions, segments=None, starts=None):
        c, (B, T, _) = self.config, x.shape
        documents = None
        if c.conv_size:
            documents = jnp.ones((B, T), jnp.int32) if segments is None else segments
            if starts is not None:
                documents = jnp.where(jnp.arange(T) >= starts[:, None], documents, 0)
            documents = jnp.pad(documents, ((0, 0), (c.conv_size - 1, 0)))
        nothing = tuple(jnp.zeros((B, max(c.conv_size - 1, 0), width), x.dtype) for width in self._widths())
        q, k, v, g, _ = self.heads(x, nothing, documents)
        mask = Mask(q_segments=segments, kv_segments=segments, starts=starts)
        o, branches = native_hybrid_attention(
            q, k, v, g, positions=positions, mask=mask, implementation=c.implementation or None,
            slot_shift=c.shift, initial_state=self._initial_state(B), return_branch_lse=True,
            document_state="initial" if c.learned_slots else "zero", **self._options(),
        )  # fmt: skip
        self._sow(branches)
        return self.readout(o)

    def init_cache(self, batch, length, starts=None):
        c = self.config
        if length < 1:
            raise ValueError(f"a cache needs room for at least one position, got length={length}")
        sizes = (c.num_kv_heads, c.slots, c.head_dim, c.values)
        cache = init_slots(batch, c.kept, *sizes, self.dtype, starts=starts)
        if not c.conv_size:
            return cache
        tails = (jnp.zeros((batch, c.conv_size - 1, width), self.dtype) for width in self._widths())
        return cache.replace(tails=tuple(tails))

    def prefill(self, x, cache):
        c, T = self.config, x.shape[1]
        documents = None
        if c.conv_size:
            at = cache.length - (c.conv_size - 1) + jnp.arange(c.conv_size - 1 + T)
            documents = (at >= jnp.maximum(cache.starts, 0)[:, None]).astype(jnp.int32)
        q, k, v, g, tails = self.heads(x, cache.tails, documents)
        name = c.implementation or ("reference" if T == 1 else None)  # one row: no blocks to fill
        start = self._initial_state(x.shape[0])
        o, branches, cache = extend_slots(
            cache, q, k, v, g, slot_shift=c.shift, initial_state=start, implementation=name, **self._options()
        )
        self._sow(branches)
        return self.readout(o), cache.replace(tails=tails)

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        H, K, both = c.num_heads, c.num_kv_heads, c.head_dim + c.values
        projections = 2 * hidden_size * ((H + K) * both + K * c.slots)
        slots = 2 * (H + K) * c.slots * both  # every query head reads, every key/value head writes
        return projections + slots + 2 * H * both * min(visible, c.window)

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        c = config
        both = c.head_dim + c.values
        token = c.num_kv_heads * (both + c.slots)
        tails = max(c.conv_size - 1, 0) * (c.num_heads * c.head_dim + c.num_kv_heads * both)
        return c.num_kv_heads * c.slots * both + c.kept * token + tails
