"""cosFormer (arXiv 2202.08791): linear attention of non-negative features, re-weighted by the cosine of the distance.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, Dv value size, C channels, M the
re-weighting length, delta = pi angle_scale / (2 M) the angle a position.

    w_ts = act(q_t) . act(k_s) cos(delta (t - s)),    act = ReLU, |t - s| < M, so every weight is >= 0
    o_t  = sum_s w_ts v_s / max(sum_s w_ts, eps)                                   `cosformer_attention`
    o_t  = norm(sum_s w_ts v_s) over all heads, with no denominator                TransNormer, arXiv 2210.10340

The decode states are in `cosformer_states`, attention over another sequence in `cosformer_cross`.
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from attnlab.attention.cosformer_states import (
    AbsoluteState,
    absolute_step,
    rotating_step,
    to_absolute,
    to_rotating,
)
from attnlab.attention.heads import merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig, register
from kernels.linear import IMPLEMENTATIONS, State, linear_attention
from kernels.linear.blockwise import CHUNK
from kernels.masks import Mask
from kernels.signatures import Array, Bool, Float, checked

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "elu1": lambda x: 1 + jax.nn.elu(x),
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.01),
    "elu": jax.nn.elu,
    "identity": lambda x: x,
}
CHOICES = {
    "act": tuple(ACTIVATIONS),
    "denominator": ("clamp", "add", "norm"),
    "norm": ("srms", "rms", "layer"),
    "m_mode": ("fixed", "length", "per_sequence"),
    "frequencies": ("shared", "fixed", "learned"),
    "init": ("paper", "uniform", "normal"),
    "decode_frame": ("absolute", "rotating"),
}


def _check_choices(**chosen: str) -> None:
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            known = ", ".join(map(repr, CHOICES[name]))
            raise ValueError(f"{name}={value!r} is unknown; choose one of {known}")


@dataclasses.dataclass(frozen=True)
class CosformerConfig(MixerConfig):
    max_length: int = 2048  # M: no row may be longer; the cosine is strongest when rows are as long
    m_mode: str = "fixed"  # "length": M is the length of each call, as published; no decoding then
    act: str = "relu"  # of queries and keys: "relu", "elu1" (1 + elu), "leaky_relu" (0.01), "elu", "identity"
    denominator: str = "clamp"  # max(den, eps); "add": den + eps; "norm": none, a norm over the token instead
    eps: float = 1e-4  # the published layer has 1e-6; larger is steadier in training
    norm: str = "srms"  # of denominator="norm": "srms" (no weights), "rms" or "layer" (both with weights)
    output_norm_eps: float = 1e-8
    norm_per_head: bool = False  # over D instead of H D channels
    angle_scale: float = 1.0  # 0: no cosine
    frequencies: str = "shared"  # one angle for all channels; "fixed", "learned": one a channel, without M
    frequency_base: float = 10_000.0  # angle of channel d of D: base^(-d / D)
    qkv_bias: bool = True
    out_proj: bool = True
    out_bias: bool = True
    init: str = (
        "paper"  # the authors' training code; "uniform": their one-file release; "normal": model.init_std
    )
    decode_frame: str = "absolute"  # the frame of the decode state; "rotating" gives the same

    def validate(self) -> None:
        _check_choices(**{name: getattr(self, name) for name in CHOICES})
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be at least 1")
        if not self.eps > 0 or not self.output_norm_eps > 0:
            raise ValueError(f"eps={self.eps} and output_norm_eps={self.output_norm_eps} must be positive")
        if not 0 <= self.angle_scale <= 1:
            raise ValueError(
                f"angle_scale={self.angle_scale} is outside [0, 1], where weights turn negative; bring it inside"
            )
        _check_norm(self.denominator, self.norm, self.norm_per_head)
        if self.frequencies != "shared" and self.denominator != "norm":
            raise ValueError(
                f"frequencies={self.frequencies!r} makes negative weights, which denominator="
                f"{self.denominator!r} cannot take; use denominator='norm'"
            )
        if self.frequencies != "shared" and self.m_mode != "fixed":
            raise ValueError(f"m_mode={self.m_mode!r} has no effect with frequencies={self.frequencies!r}")


def _check_norm(denominator: str, norm: str, norm_per_head: bool) -> None:
    if denominator != "norm" and (norm != "srms" or norm_per_head):
        raise ValueError(
            f"{norm=} and {norm_per_head=} have no effect with {denominator=}; use denominator='norm'"
        )


def reweighting_angle(length: int | Array, angle_scale: float = 1.0) -> float | Array:
    """delta = pi angle_scale / (2 M), radians a position; an array of lengths [B] gives [B, 1]."""
    if isinstance(length, int):
        return math.pi * angle_scale / (2 * length)
    wide = jnp.promote_types(jnp.float32, jnp.result_type(float))
    return (
        (math.pi * angle_scale / (2 * jnp.maximum(length, 1).astype(wide)))[:, None] if angle_scale else 0.0
    )


def divide(num: Array, den: Array, denominator: str, eps: float) -> Array:
    """num [..., Dv] over den [...]: / max(den, eps) for "clamp", / (den + eps) for "add".

    Below eps the clamped denominator is a constant and has no gradient.
    """
    safe = jnp.where(den > eps, den, eps) if denominator == "clamp" else den + eps
    return num / safe[..., None]


def normalise(num: Array, norm: str, eps: float, per_head: bool = False) -> Array:
    """NormAttention's norm over all H Dv channels of a token (or over each head's Dv), num [..., H, Dv], no weights.

    "srms": x / (rms(x) + eps); "rms": x / sqrt(mean x^2 + eps); "layer": the same of x - mean(x).
    """
    axes = (-1,) if per_head else (-2, -1)
    if norm == "layer":
        num = num - num.mean(axes, keepdims=True)
    square = jnp.mean(jnp.square(num), axes, keepdims=True)
    if norm != "srms":
        return num * jax.lax.rsqrt(square + eps)
    some = square > 0  # the root has no gradient at 0
    return num / (jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0) + eps)


@checked
def cosformer_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    m_mode: str = "fixed",
    max_length: int | None = None,
    act: str = "relu",
    denominator: str = "clamp",
    eps: float = 1e-6,
    norm: str = "srms",
    norm_eps: float = 1e-8,
    norm_per_head: bool = False,
    angle_scale: float = 1.0,
    freqs: Float[Array, " D"] | None = None,
    key_mask: Bool[Array, "B S"] | None = None,
    allowed: Bool[Array, "B T S"] | None = None,
    return_denominator: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"] | tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """cosFormer attention of queries and keys before their activation (2202.08791, cos-based re-weighting).

    Query t and key s stand at equal absolute positions, whatever T and S. Rows that see no key give 0.

    Args:
        q, k, v: one float dtype; no scaling, K divides H.
        mask: visibility, causal by default; no window.
        m_mode: "fixed": M = max_length, which bounds T and S; "length": M = max(T, S) of this call, so that a longer
            row changes its beginning too; "per_sequence": M is the number of each row's keys that are no padding,
            for masks that are not causal.
        max_length: M of "fixed".
        act: "relu", "elu1", "leaky_relu", "elu" or "identity"; the last three can make weights negative.
        denominator, eps: "clamp" or "add", see `divide`; "norm": no denominator, see `normalise` for the norm options.
        angle_scale: factor of the angle, 0 for no cosine; above 1 weights turn negative.
        freqs: radians a position for each channel, in place of pi / 2M; then no length is needed. Learnable.
        key_mask: False for keys that nobody sees.
        allowed: a dense mask on top; the reference takes it.
        return_denominator: also return the sum of weights [B, T, H] in the accumulation dtype.
        implementation: as for `kernels.linear.linear_attention`.

    Returns: o in q's dtype.

    Raises: ValueError for sizes past M, options that are unknown or do not go together, and what the kernel refuses.
    """
    _check_choices(act=act, denominator=denominator, norm=norm, m_mode=m_mode)
    _check_norm(denominator, norm, norm_per_head)
    if not eps > 0:
        raise ValueError(f"{eps=} must be positive")
    if freqs is not None:
        if m_mode != "fixed" or max_length is not None:
            raise ValueError(f"{m_mode=} and {max_length=} have no effect with freqs; leave them out")
        angle = angle_scale * freqs
    else:
        length = reweighting_length(m_mode, max_length, q.shape[1], k.shape[1], mask, key_mask)
        angle = reweighting_angle(length, angle_scale)
    fq, fk = (ACTIVATIONS[act](x) for x in (q, k))
    if key_mask is not None:
        fk, v = (jnp.where(key_mask[:, :, None, None], x, 0) for x in (fk, v))
    num, den = linear_attention(
        fq, fk, v, mask=mask, angle=angle, allowed=allowed, implementation=implementation
    )
    normed = denominator == "norm"
    o = normalise(num, norm, norm_eps, norm_per_head) if normed else divide(num, den, denominator, eps)
    o = o.astype(q.dtype)
    return (o, den) if return_denominator else o


def reweighting_length(m_mode, max_length, T, S, mask, key_mask):
    """M: an int, or int32 [B] for "per_sequence"; ValueError where it does not hold."""
    last = max(T + mask.q_offset if isinstance(mask.q_offset, int) else T, S)
    if m_mode != "fixed" and max_length is not None:
        raise ValueError(f"{max_length=} has no effect with {m_mode=}; use m_mode='fixed'")
    if m_mode == "length":
        return last
    if m_mode == "fixed":
        if max_length is None:
            raise ValueError("m_mode='fixed' needs max_length, the longest row wanted; give it")
        check_length(last, max_length)
        return max_length
    if mask.causal:
        raise ValueError(
            "m_mode='per_sequence' needs a mask with causal=False: a causal row must not know its length"
        )
    return _valid_keys(mask, S, key_mask)


def _valid_keys(mask, S, key_mask):
    """Keys of each row that are no padding, int32 [B] (or [1])."""
    j, valid = jnp.arange(S)[None], jnp.ones((1, S), bool)
    if mask.lengths is not None:
        valid &= j < jnp.reshape(mask.lengths, (-1, 1))
    if mask.starts is not None:
        valid &= j >= jnp.reshape(mask.starts, (-1, 1))
    if mask.kv_segments is not None:
        valid &= mask.kv_segments != 0
    if key_mask is not None:
        valid &= key_mask
    return valid.sum(1, dtype=jnp.int32)


def check_length(length: int, max_length: int) -> None:
    if length > max_length:
        raise ValueError(
            f"{length} positions pass max_length={max_length}, where the cosine turns negative; raise max_length"
        )


class OutputNorm(nn.Module):
    """`normalise` with a weight a channel, num [B, T, H, D] -> the same."""

    norm: str
    eps: float
    per_head: bool
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, num: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, num.shape[-2:], self.param_dtype)
        return normalise(num, self.norm, self.eps, self.per_head) * scale.astype(num.dtype)


class CosformerLayer(Mixer):
    """What self and cross attention share: projections, features, angle, division and output."""

    Config: ClassVar[type[MixerConfig]] = CosformerConfig
    paper: ClassVar[str] = "cosFormer, arXiv 2202.08791"
    masks: ClassVar[tuple[str, ...]] = ("causal", "segments", "left padding", "grouped heads")
    implementations: ClassVar[tuple] = IMPLEMENTATIONS

    def setup(self):
        c = self.config
        query_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.query = self._projection(query_size, "query", c.qkv_bias)
        self.key = self._projection(kv_size, "key", c.qkv_bias)
        self.value = self._projection(kv_size, "value", c.qkv_bias, gain=0.5)
        if c.out_proj:
            self.out = self._projection(self.hidden_size, "out", c.out_bias, gain=1.0)
        elif query_size != self.hidden_size:
            raise ValueError(
                f"out_proj=False needs num_heads * head_dim = {query_size} to be hidden_size={self.hidden_size}"
            )
        if c.denominator == "norm" and c.norm != "srms":
            self.output_norm = OutputNorm(c.norm, c.output_norm_eps, c.norm_per_head, self.param_dtype)
        if c.frequencies != "shared":
            start = c.frequency_base ** (-jnp.arange(c.head_dim, dtype=self.param_dtype) / c.head_dim)
            learned = c.frequencies == "learned"
            self.freqs = self.param("frequencies", lambda _: start) if learned else start

    def _projection(self, features: int, name: str, use_bias: bool, gain: float | None = None) -> nn.Dense:
        """A Dense with the authors' initial values. gain: of Xavier's variance; None: uniform in +-1/sqrt(inputs)."""
        c, uniform = self.config, nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        kernel, bias = uniform, _uniform_bias(c.num_heads * c.head_dim if name == "out" else self.hidden_size)
        if c.init == "normal":
            kernel, bias = nn.initializers.normal(self.init_std), nn.initializers.zeros
        elif c.init == "paper" and gain is not None:
            kernel = nn.initializers.variance_scaling(gain, "fan_avg", "uniform")
            bias = nn.initializers.zeros if name == "out" else bias
        options = {"use_bias": use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(features, name=name, kernel_init=kernel, bias_init=bias, **options)

    def angle(self) -> float | Array:
        """Radians a position with a fixed M, or one a channel [D]."""
        c = self.config
        if c.frequencies != "shared":
            return c.angle_scale * self.freqs
        return reweighting_angle(c.max_length, c.angle_scale)

    def features(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        """act(q) [B, T, H, D], act(k) [B, S, K, D] and v [B, S, K, D]."""
        c, act = self.config, ACTIVATIONS[self.config.act]
        q = split_heads(self.query(query), c.num_heads)
        k, v = (split_heads(f(x), c.num_kv_heads) for f, x in ((self.key, key), (self.value, value)))
        return act(q), act(k), v

    def readout(self, fq: Array, num: Array, den: Array) -> Array:
        """[B, T, C]: divide or normalise, merge heads, project; notes dead queries and small denominators a head."""
        c = self.config
        self.sow("intermediates", "low_denominator", jnp.mean(den < c.eps, axis=(0, 1)))
        self.sow("intermediates", "dead_query", jnp.mean(jnp.all(fq == 0, axis=-1), axis=(0, 1)))
        if c.denominator != "norm":
            o = divide(num, den, c.denominator, c.eps)
        elif c.norm == "srms":
            o = normalise(num, "srms", c.output_norm_eps, c.norm_per_head)
        else:
            o = self.output_norm(num)
        o = merge_heads(o.astype(self.dtype))
        return self.out(o) if c.out_proj else o


def _uniform_bias(inputs: int):
    """Initialiser of a bias beside a kernel of `inputs` inputs: uniform in +-1/sqrt(inputs)."""

    def draw(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / math.sqrt(inputs)

    return draw


@struct.dataclass
class CosformerCache:
    """state: AbsoluteState, or State in the rotating frame; starts [B] and length [] int32, as in a KVCache.

    Its size does not depend on `room`, the number of positions asked for, after which outputs are NaN.
    """

    state: Any
    starts: Array
    length: Array
    room: int = struct.field(pytree_node=False)


@register("cosformer")
class CosformerAttention(CosformerLayer):
    """The causal layer. Its decode cache is the state, of the same size whatever the length."""

    def __call__(self, x, *, positions, segments=None, starts=None):
        c, angle = self.config, self.angle()
        if c.m_mode == "per_sequence":
            raise ValueError("m_mode='per_sequence' is not causal; use 'fixed', or CrossCosformerAttention")
        if c.m_mode == "length":
            angle = reweighting_angle(x.shape[1], c.angle_scale)
        elif c.frequencies == "shared":
            check_length(x.shape[1], c.max_length)
        fq, fk, v = self.features(x, x, x)
        mask = Mask(q_segments=segments, kv_segments=segments, starts=starts)
        num, den = linear_attention(
            fq, fk, v, mask=mask, angle=angle, implementation=c.implementation or None
        )
        return self.readout(fq, num, den)

    def init_cache(self, batch, length, starts=None):
        c = self.config
        if length < 1:
            raise ValueError(f"a cache needs room for at least one position, got length={length}")
        if c.m_mode != "fixed":
            raise ValueError(f"m_mode={c.m_mode!r} has no decode state, as M changes; use m_mode='fixed'")
        if c.frequencies == "shared":
            check_length(length, c.max_length)
        wide = jnp.promote_types(jnp.float32, self.dtype)
        zeros = jnp.zeros((batch, c.num_kv_heads, c.head_dim, c.head_dim + 1), wide)
        make = AbsoluteState if c.decode_frame == "absolute" else State
        starts = jnp.zeros(batch, jnp.int32) if starts is None else jnp.asarray(starts, jnp.int32)
        return CosformerCache(make(zeros, zeros), starts, jnp.zeros((), jnp.int32), length)

    def prefill(self, x, cache):
        c, angle, T = self.config, self.angle(), x.shape[1]
        if cache.room < T:
            raise ValueError(f"{T} tokens do not fit a cache of {cache.room} positions; make a longer cache")
        fq, fk, v = self.features(x, x, x)
        state, absolute = cache.state, c.decode_frame == "absolute"
        if absolute:
            state = to_rotating(state, angle, cache.length)
        if c.angle_scale == 0:
            state = State(state.real)  # nothing turns
        num, den, new = linear_attention(
            fq, fk, v, mask=Mask(starts=cache.starts - cache.length), angle=angle, initial_state=state,
            return_state=True, implementation=c.implementation or None,
        )  # fmt: skip
        new = State(new.real, jnp.zeros_like(new.real) if new.imag is None else new.imag)
        new = to_absolute(new, angle, cache.length + T) if absolute else new
        return self._append(self.readout(fq, num, den), cache, new, T)

    def step(self, x, cache):
        c, angle = self.config, self.angle()
        if x.shape[1] != 1 or c.implementation:
            return super().step(x, cache)
        fq, fk, v = self.features(x, x, x)
        real = (cache.length >= cache.starts)[:, None, None, None]
        fk, v = jnp.where(real, fk, 0), jnp.where(real, v, 0)
        if c.decode_frame == "absolute":
            num, den, new = absolute_step(cache.state, fq, fk, v, angle, cache.length[None, None])
        else:
            num, den, new = rotating_step(cache.state, fq, fk, v, angle)
        return self._append(self.readout(fq, num, den), cache, new, 1)

    def _append(self, y, cache, state, count):
        cache = cache.replace(state=state, length=cache.length + count)
        return jnp.where(cache.length > cache.room, jnp.nan, y).astype(y.dtype), cache

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        width = c.num_heads * (2 if c.out_proj else 1) + 2 * c.num_kv_heads
        parts = 2 if c.angle_scale else 1  # cosine and sine
        features = parts * c.head_dim if c.frequencies != "shared" else c.head_dim
        columns = c.head_dim + 1  # the values and the denominator
        in_chunk = c.num_heads * min(visible, CHUNK) * (features + columns)
        readers = c.num_heads + c.num_kv_heads * (visible > CHUNK)  # one chunk alone leaves no state behind
        of_state = readers * parts * c.head_dim * columns
        return 2 * (hidden_size * c.head_dim * width + in_chunk + of_state)

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        return 2 * config.num_kv_heads * config.head_dim * (config.head_dim + 1)
