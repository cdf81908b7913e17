"""Forgetting Transformer (FoX), arXiv 2503.02130: softmax attention whose logits carry a learned decay.

Every head computes one forget gate f_t in (0, 1) a token; the log of the product of the gates between a key and a
query is added to their logit. Options turn the plain ("LLaMA") layer into the paper's "Pro" layer. Adaptive
computation pruning (arXiv 2504.06949) skips key blocks which the decay has made negligible.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, C channels; ~k, ~v: keys and
values before the shift.

    log f_t  = log sigmoid(W_f x_t + b_f)                                   `log_forget_gate`
    k_t      = a_t ~k_{t-1} + (1 - a_t) ~k_t,   a_t = sigmoid(w . x_t)       `token_shift` (likewise v)
    o_i      = sum_j softmax_j(q_i . k_j / sqrt(D) + sum_{l=j+1..i} log f_l) v_j     kernels.forgetting
    y_i      = W_o (norm(o_i) * sigmoid(W_g x_i))                            `ForgettingAttention`
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from attnlab.attention import kv_cache
from attnlab.attention.heads import head_norm, merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig, register
from attnlab.attention.rotary import rotate
from kernels.forgetting import IMPLEMENTATIONS, forgetting_attention
from kernels.masks import Mask

Array = jax.Array
GATES = ("full", "bias_only", "fixed", "none")
OUTPUT_GATES = ("none", "sigmoid", "silu")


@dataclasses.dataclass(frozen=True)
class ForgettingConfig(MixerConfig):
    gate: str = (
        "full"  # "full": from the input; "bias_only": one learned gate a head; "fixed": constant; "none"
    )
    gate_log_spaced: bool = False  # start bias_only gates at the time scales below ("fixed" always does)
    gate_time_min: float = (
        2.0  # T_min, T_max in tokens: head h forgets by 1/e in T_h, log-spaced between them
    )
    gate_time_max: float = 256.0
    log_f_min: float = -math.inf  # lower clamp of log f; the paper has none
    qk_norm: bool = False
    qk_norm_shared: bool = False  # one norm weight [D] for all heads, as in the paper's published runs
    qk_norm_eps: float = 1e-5
    key_shift: bool = False
    value_shift: bool = False
    output_norm: bool = False
    output_gate: str = "none"  # "sigmoid", or "silu" without output_norm
    rope: bool = False
    rope_theta: float = 500_000.0
    window: int = 0  # a query sees the last `window` positions, its own included; 0: all before it
    decay_mode: str = (
        "local"  # how decay sums are formed: "local" is exact at any length, "global" as published
    )
    pruning: bool = (
        False  # adaptive computation pruning with the safe automatic threshold; not in single steps
    )
    log_pruning_tolerance: float = -10.0  # ln of the attention mass that pruning may drop

    def validate(self) -> None:
        _one_of("gate", self.gate, GATES)
        _one_of("output_gate", self.output_gate, OUTPUT_GATES)
        _one_of("decay_mode", self.decay_mode, ("local", "global"))
        if self.output_gate == "silu" and self.output_norm:
            raise ValueError("output_gate='silu' goes with output_norm=False only; use output_gate='sigmoid'")
        if not 0 < self.gate_time_min <= self.gate_time_max:
            raise ValueError(
                f"gate times must satisfy 0 < gate_time_min <= gate_time_max, got {self.gate_time_min} and "
                f"{self.gate_time_max}; swap or change them"
            )
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, got {self.head_dim}; change it or set rope=False")
        if self.window < 0:
            raise ValueError(f"window={self.window} is negative; use 0 for no window")
        if self.gate_log_spaced and self.gate in ("full", "none"):
            raise ValueError(
                f"gate_log_spaced=True has no effect with gate={self.gate!r}; use gate='bias_only'"
            )
        if self.qk_norm_shared and not self.qk_norm:
            raise ValueError("qk_norm_shared=True has no effect with qk_norm=False; set qk_norm=True")
        if self.pruning and self.gate == "none":
            raise ValueError("pruning=True needs a forget gate, got gate='none'; choose another gate")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")


PRO = {"qk_norm": True, "output_norm": True, "output_gate": "sigmoid", "key_shift": True, "value_shift": True}
"""Options of the paper's Pro layer over the plain one."""


def log_forget_gate(logits: Array, log_f_min: float = -math.inf) -> Array:
    """log f = log sigmoid(logits) in float32 (float64 for float64 logits), not below log_f_min. Any shape."""
    log_f = jax.nn.log_sigmoid(logits.astype(jnp.promote_types(jnp.float32, logits.dtype)))
    return jnp.maximum(log_f, log_f_min) if log_f_min > -math.inf else log_f


def log_spaced_bias(num_heads: int, time_min: float, time_max: float) -> np.ndarray:
    """Gate logits b [H] with log sigmoid(b_h) = -1/T_h exactly, T_h log-spaced from time_min to time_max tokens.

    A fixed gate of this kind is ALiBi with slopes 1/T_h.
    """
    times = np.exp(np.linspace(np.log(time_min), np.log(time_max), num_heads))
    return -np.log(np.expm1(1.0 / times))


def token_shift(current: Array, alpha: Array, before: Array, has_previous: Array) -> Array:
    """alpha * previous token + (1 - alpha) * current token, head by head (section "KV-shift" of the Pro block).

    current [B, T, K, D]; alpha [B, T, K] in (0, 1); before [B, K, D] is the token before the first one;
    has_previous [B or 1, T] bool, False where the previous token belongs to padding or another document.
    """
    previous = jnp.concatenate([before[:, None].astype(current.dtype), current[:, :-1]], axis=1)
    previous = jnp.where(has_previous[..., None, None], previous, 0)
    alpha = alpha[..., None]
    return (alpha * previous + (1 - alpha) * current).astype(current.dtype)


@struct.dataclass
class ForgettingCache:
    """kv: keys, values and log gates; key_tail, value_tail [B, K, D]: ~k and ~v of the last token, or None."""

    kv: kv_cache.KVCache
    key_tail: Array | None
    value_tail: Array | None


@register("forgetting")
class ForgettingAttention(Mixer):
    """The FoX attention layer with all its options; the cache holds S (or `window`) keys, values and gates."""

    Config: ClassVar[type[MixerConfig]] = ForgettingConfig
    paper: ClassVar[str] = "Forgetting Transformer, arXiv 2503.02130"
    masks: ClassVar[tuple[str, ...]] = (*Mixer.masks, "window")
    implementations: ClassVar[tuple] = IMPLEMENTATIONS

    def setup(self):
        c = self.config
        kv_size = c.num_kv_heads * c.head_dim
        self.query = self.dense(c.num_heads * c.head_dim, "query")
        self.key, self.value = self.dense(kv_size, "key"), self.dense(kv_size, "value")
        self.out = self.dense(self.hidden_size, "out")
        self._setup_gate()
        if c.key_shift:
            self.key_shift = self._wide_dense(c.num_kv_heads, "key_shift")
        if c.value_shift:
            self.value_shift = self._wide_dense(c.num_kv_heads, "value_shift")
        if c.qk_norm:
            rest = (c.head_dim, c.qk_norm_eps, c.qk_norm_shared, self.param_dtype)
            self.query_norm = head_norm(c.num_heads, *rest, "query_norm")
            self.key_norm = head_norm(c.num_kv_heads, *rest, "key_norm")
        if c.output_norm:
            self.output_norm = head_norm(
                c.num_heads, c.head_dim, self.norm_eps, False, self.param_dtype, "output_norm"
            )
        if c.output_gate != "none":
            self.output_gate = self.dense(c.num_heads * c.head_dim, "output_gate")

    @property
    def _wide(self):
        return jnp.promote_types(jnp.float32, self.dtype)

    def _wide_dense(self, features: int, name: str, use_bias: bool = False) -> nn.Dense:
        """Gates are computed in float32 whatever the compute dtype: their logs are summed over the sequence."""
        return nn.Dense(
            features,
            use_bias=use_bias,
            name=name,
            dtype=self._wide,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(self.init_std),
        )

    def _setup_gate(self):
        c = self.config
        spaced = log_spaced_bias(c.num_heads, c.gate_time_min, c.gate_time_max)
        if c.gate == "full":
            self.forget_gate = self._wide_dense(c.num_heads, "forget_gate", use_bias=True)
        elif c.gate == "bias_only":
            start = jnp.asarray(spaced if c.gate_log_spaced else np.zeros(c.num_heads), self.param_dtype)
            self.forget_gate_bias = self.param("forget_gate_bias", lambda _: start)
        elif c.gate == "fixed":
            self.forget_gate_bias = jnp.asarray(spaced, self._wide)

    def log_gate(self, x: Array) -> Array | None:
        """log f [B, T, H] of x [B, T, C], or None without a gate."""
        c = self.config
        if c.gate == "none":
            return None
        logits = self.forget_gate(x) if c.gate == "full" else self.forget_gate_bias
        log_f = log_forget_gate(logits, c.log_f_min)
        log_f = jnp.broadcast_to(log_f, (*x.shape[:2], c.num_heads))
        self.sow("intermediates", "log_f", log_f)
        return log_f

    def heads(self, x: Array, positions: Array, has_previous: Array, tails: tuple[Array, Array]):
        """q [B, T, H, D], k and v [B, T, K, D] of x: projected, shifted, normed, rotated; and the new tails."""
        c = self.config
        q = split_heads(self.query(x), c.num_heads)
        k = raw_k = split_heads(self.key(x), c.num_kv_heads)
        v = raw_v = split_heads(self.value(x), c.num_kv_heads)
        if c.key_shift:
            k = token_shift(k, jax.nn.sigmoid(self.key_shift(x)), tails[0], has_previous)
        if c.value_shift:
            v = token_shift(v, jax.nn.sigmoid(self.value_shift(x)), tails[1], has_previous)
        if c.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if c.rope:
            q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
        return q, k, v, (raw_k[:, -1], raw_v[:, -1])

    def attend(self, q: Array, k: Array, v: Array, log_f: Array | None, mask: Mask) -> Array:
        c = self.config
        one_row = q.shape[1] == 1  # dense is linear in S then
        return forgetting_attention(
            q,
            k,
            v,
            log_f,
            mask=mask,
            acp_threshold=None if one_row else self.pruning_threshold(mask, k.shape[1]),
            log_pruning_tolerance=c.log_pruning_tolerance,
            decay_mode=c.decay_mode,
            implementation=c.implementation or ("reference" if one_row else None),
        )

    def pruning_threshold(self, mask: Mask, keys: int) -> Array | str | None:
        """Safe threshold of adaptive computation pruning (arXiv 2504.06949): from the norm weights, or "auto"."""
        c = self.config
        if not c.pruning or not c.qk_norm:
            return "auto" if c.pruning else None
        largest = [
            jnp.max(jnp.abs(norm.variables["params"]["scale"]), axis=-1)
            for norm in (self.query_norm, self.key_norm)
        ]
        query, key = (
            jnp.broadcast_to(w, heads)
            for w, heads in zip(largest, (c.num_heads, c.num_kv_heads), strict=True)
        )
        bound = query * jnp.repeat(key, c.num_heads // c.num_kv_heads) * math.sqrt(c.head_dim)
        return jax.lax.stop_gradient(-(2 * bound + math.log(keys)) + c.log_pruning_tolerance)[None]

    def readout(self, o: Array, x: Array) -> Array:
        """o [B, T, H, D] -> y [B, T, C]: output norm, output gate, output projection, each if asked for."""
        c = self.config
        o = merge_heads(self.output_norm(o) if c.output_norm else o)
        if c.output_gate != "none":
            o = o * getattr(jax.nn, c.output_gate)(self.output_gate(x))
        return self.out(o)

    def __call__(self, x, *, positions, segments=None, starts=None):
        c = self.config
        nothing = jnp.zeros((x.shape[0], c.num_kv_heads, c.head_dim), x.dtype)
        before = has_previous_token(x.shape[1], segments, starts)
        q, k, v, _ = self.heads(x, positions, before, (nothing, nothing))
        mask = Mask(window=c.window or None, q_segments=segments, kv_segments=segments, starts=starts)
        return self.readout(self.attend(q, k, v, self.log_gate(x), mask), x)

    def init_cache(self, batch, length, starts=None):
        c = self.config
        kv = kv_cache.init_cache(
            batch,
            length,
            c.num_kv_heads,
            c.head_dim,
            self.dtype,
            gate_heads=0 if c.gate == "none" else c.num_heads,
            window=c.window or None,
            starts=starts,
        )
        tail = jnp.zeros((batch, c.num_kv_heads, c.head_dim), self.dtype)
        return ForgettingCache(kv, tail if c.key_shift else None, tail if c.value_shift else None)

    def prefill(self, x, cache):
        c = self.config
        positions = kv_cache.new_positions(cache.kv, x.shape[1])
        q, k, v, tails = self.heads(x, positions, positions > 0, (cache.key_tail, cache.value_tail))
        (k, v, log_f, mask), kv = kv_cache.extend(cache.kv, k, v, self.log_gate(x), c.window or None)
        y = self.readout(self.attend(q, k, v, log_f, mask), x)
        tails = (tails[0] if c.key_shift else None, tails[1] if c.value_shift else None)
        return kv_cache.poison_overflow(y, kv), ForgettingCache(kv, *tails)

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        width = c.num_heads * c.head_dim * (3 if c.output_gate != "none" else 2)  # query, out and output gate
        width += 2 * c.num_kv_heads * c.head_dim
        width += c.num_heads * (c.gate == "full") + c.num_kv_heads * (c.key_shift + c.value_shift)
        seen = min(visible, c.window) if c.window else visible
        return 2 * hidden_size * width + 2 * 2 * c.num_heads * c.head_dim * seen

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        c = config
        kept = kv_cache.slots(length, c.window or None)
        gates = 0 if c.gate == "none" else c.num_heads
        tails = (c.key_shift + c.value_shift) * c.num_kv_heads * c.head_dim
        return kept * (2 * c.num_kv_heads * c.head_dim + gates) + tails


def has_previous_token(length: int, segments: Array | None, starts: Array | None) -> Array:
    """[B or 1, T] bool: the token before t is real and of t's own document. segments [B, T], starts [B]."""
    index = jnp.arange(length, dtype=jnp.int32)[None]
    before = index > 0 if starts is None else index > jnp.maximum(starts, 0)[:, None]
    if segments is None:
        return before
    return before & (segments == jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1))
