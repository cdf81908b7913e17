"""Inverse distance weighting attention (IDW), arXiv 2310.18805: weights are normalised inverse distances of q and k.

The score inside the softmax is minus the log of the distance, so exp and log cancel and attention becomes Shepard's
interpolation: a query that meets a key takes its value, one far from all keys takes their mean. The paper uses it in a
one-hidden-layer network (`attnlab/attention/prototypes.py`); the multi-head causal layer below is an extension of it.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D, Dv head sizes, C channels; r distance,
p `power`, w weight, Z sum of the weights.

    r2_ij = |q_i|^2 + |k_j|^2 - 2 q_i.k_j                                          `squared_distances`
    w_ij  = 1 / (eps + r_ij^p)           "official", as the paper's code            `InverseDistance`
          = 1 / (eps + r_ij^2)^(p/2)     "rq", rational quadratic; equal at p = 2
    o_i   = sum_j w_ij v_j / Z_i,        Z_i = sum_j w_ij over the visible keys     `inverse_distance_attention`

p = 2, the paper's, is nearly uniform for head sizes of 16 and more: the score's standard deviation is p / sqrt(2 D) for
normal q and k. The layer therefore starts from p = sqrt(2 D) and learns p.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnlab.attention import kv_cache
from attnlab.attention.heads import head_norm, merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig, register
from attnlab.attention.rotary import rotate
from attnlab.attention.softmax import alibi_slopes
from kernels.masks import Mask
from kernels.signatures import Array, Float, checked
from kernels.streaming import IMPLEMENTATIONS, streaming_attention

FORMS = ("official", "rq")


def squared_norms(x: jax.Array) -> jax.Array:
    """|x|^2 over the last axis, in float32 at least, of the vectors as they are rounded.

    So distances are those of the rounded vectors; norms of unrounded vectors would spoil near hits.
    """
    return jnp.sum(x.astype(jnp.promote_types(jnp.float32, x.dtype)) ** 2, -1)


def squared_distances(x: jax.Array, q2: jax.Array, k2: jax.Array, D: int) -> tuple[jax.Array, jax.Array]:
    """|q_i - k_j|^2, not below 0, and the size of its rounding error: two [T, S].

    From the products x = q.k [T, S] of vectors of D numbers and their `squared_norms` q2 [T, 1] and k2 [1, S].
    """
    norms = q2 + k2
    error = math.sqrt(D) * jnp.finfo(x.dtype).eps * norms
    return jnp.maximum(norms - 2 * x, 0), jax.lax.stop_gradient(error)


def raise_distance(r2: jax.Array, error: jax.Array, power: float | jax.Array) -> jax.Array:
    """r^power from r2 = r^2; a distance below its rounding error counts as 0, with gradient 0 (powers below 2 have
    none there, or an infinite one)."""
    if isinstance(power, (int, float)) and power % 2 == 0:
        return r2 ** int(power // 2)
    real = r2 > error
    return jnp.where(real, jnp.where(real, r2, 1) ** (power / 2), 0)


@dataclass(frozen=True)
class InverseDistance:
    """log w as a score of `kernels.streaming` for vectors of D numbers.

    of_rows and of_cols are the squared norms of queries and keys; extras eps, power unless fixed, ALiBi slope if any.
    """

    D: int
    form: str = "official"
    power: float | None = None  # None: an array, given beside eps
    exclude_self: bool = False

    def __call__(self, x, rows, cols, of_rows, of_cols, extras):
        eps, *rest = extras
        power, slope = (rest[0], rest[1:]) if self.power is None else (self.power, rest)
        r2, error = squared_distances(x, *of_rows, *of_cols, self.D)
        if self.form == "rq" or self.power == 2:
            s = -(power / 2) * jnp.log(eps + r2)
        else:
            s = -jnp.log(eps + raise_distance(r2, error, power))
        behind = rows - cols
        if slope:
            s = s - slope[0] * jnp.abs(behind).astype(s.dtype)
        return jnp.where(behind == 0, -jnp.inf, s) if self.exclude_self else s


@checked
def inverse_distance_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    power: float | Float[Array, " H"] | Float[Array, ""] = 2.0,
    eps: float | Float[Array, " H"] | Float[Array, ""] = 1e-3,
    form: str = "official",
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    slopes: Float[Array, " H"] | None = None,
    center: bool = False,
    exclude_self: bool = False,
    return_log_z: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"] | tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Attention with weights 1 / (eps + r^p) ("official") or (eps + r^2)^(-p/2) ("rq"): the letters stand above.

    Query head h reads key/value head h // (H / K). A row without a visible key gives o = 0, log Z = -inf and
    gradients of zero; where q meets k exactly, the gradient through their distance is 0. There is no 1 / sqrt(D).

    Args:
        power: p > 0, on the distance; a number, or an array (one per head, or one for all), differentiated.
        eps: > 0, added to r^p ("official") or r^2 ("rq"); likewise. In float32, below 1e-6 the rounding of r^2
            decides near hits.
        form: "official" or "rq"; use "rq" to learn powers.
        mask: visibility; see `kernels.masks.Mask`.
        slopes: m >= 0 per head, ALiBi: weights are multiplied by exp(-m |a_i - j|).
        center: subtract one vector per key/value head and document from q and k, without gradient. Distances do not
            change, but their rounding error falls if all vectors share an offset. See `centers`.
        exclude_self: row i does not see key a_i. For queries and keys from one projection, whose distance to
            themselves is 0.
        return_log_z: also return log Z.
        implementation: "blockwise" (memory linear in T and S), "reference" (dense), or None for the platform's best.

    Returns:
        o [B, T, H, Dv] in q's dtype; with return_log_z also log Z [B, T, H], float32 (float64 for float64 operands).

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown form, or a power, eps that is not positive.
    """
    if form not in FORMS:
        raise ValueError(f"{form=} is unknown; choose one of {', '.join(map(repr, FORMS))}")
    for name, value in (("power", power), ("eps", eps)):
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be positive and finite")
    if center:
        of_queries, of_keys = centers(k, mask, q.shape[1])
        q, k = q - jnp.repeat(of_queries, q.shape[2] // k.shape[2], axis=2), k - of_keys
    fixed = isinstance(power, (int, float))
    score = InverseDistance(q.shape[-1], form, float(power) if fixed else None, exclude_self)
    wide = jnp.promote_types(jnp.float32, q.dtype)
    extras = (eps, *(() if fixed else (power,)), *(() if slopes is None else (slopes,)))
    extras = tuple(jnp.broadcast_to(jnp.asarray(x, wide), q.shape[2:3]) for x in extras)
    q2, k2 = squared_norms(q), jnp.repeat(squared_norms(k), q.shape[2] // k.shape[2], axis=2)
    return streaming_attention(
        score,
        q,
        k,
        v,
        (q2,),
        (k2,),
        extras,
        mask=mask,
        return_lse=return_log_z,
        implementation=implementation,
    )


def centers(k: jax.Array, mask: Mask, T: int) -> tuple[jax.Array, jax.Array]:
    """What `center` subtracts from each query and each key, [B, T or 1, K, D] and [B, S or 1, K, D], no gradient.

    Without segments and causality: the mean of the valid keys. Otherwise the first valid key of the document, which
    all its later queries may see; a query and the keys it sees always share the vector, or distances would change.
    """
    k, S = jax.lax.stop_gradient(k), k.shape[1]
    valid = jnp.ones((k.shape[0], S), bool)
    if mask.starts is not None:
        valid &= jnp.arange(S) >= mask.starts[:, None]
    if mask.lengths is not None:
        valid &= jnp.arange(S) < jnp.reshape(jnp.asarray(mask.lengths), (-1, 1))
    if mask.q_segments is None and not mask.causal:
        wide, weight = jnp.promote_types(jnp.float32, k.dtype), valid[..., None, None]
        mean = jnp.sum(jnp.where(weight, k.astype(wide), 0), 1, keepdims=True)
        mean = (mean / jnp.maximum(weight.sum(1, keepdims=True), 1)).astype(k.dtype)
        return mean, mean
    if mask.q_segments is None:
        first = jnp.take_along_axis(k, jnp.argmax(valid, axis=1)[:, None, None, None], axis=1)
        return first, first
    documents = jnp.where(valid, mask.kv_segments, 0)
    order = jnp.argsort(documents, axis=1, stable=True)
    ordered = jnp.take_along_axis(documents, order, axis=1)

    def first_of(segments):
        at = jnp.minimum(jax.vmap(jnp.searchsorted)(ordered, segments), S - 1)
        return jnp.take_along_axis(k, jnp.take_along_axis(order, at, axis=1)[..., None, None], axis=1)

    return first_of(mask.q_segments), first_of(documents)


@dataclasses.dataclass(frozen=True)
class InverseDistanceConfig(MixerConfig):
    form: str = "rq"  # of the weights: "rq" or the paper's "official"
    power: float = (
        0.0  # p, or where it starts if learned; 0: sqrt(2 D), unit variance of scores; the paper: 2
    )
    learn_power: bool = True  # one p = softplus(parameter) per head
    eps: float = 1e-3
    learn_eps: bool = False  # one eps = softplus(parameter) per head
    qk_norm: bool = False
    qk_norm_eps: float = 1e-5
    shared_qk: bool = False  # keys from the projection of the queries
    exclude_self: bool = False  # no token attends to itself; the first one then gets 0
    center: bool = False  # subtract the document's first key from q and k: less rounding, same distances
    rope: bool = True  # distances depend on relative positions then
    rope_theta: float = 500_000.0
    alibi: bool = False  # weights fall by exp(-m_h) a token; see `softmax.alibi_slopes`
    window: int = 0  # a query sees the last `window` positions, its own included; 0: all before it

    def validate(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r} is unknown; choose one of {', '.join(map(repr, FORMS))}")
        if not 0 <= self.power < math.inf:
            raise ValueError(f"power={self.power} must be positive, or 0 for sqrt(2 head_dim)")
        if not 1e-6 <= self.eps < math.inf:
            raise ValueError(
                f"eps={self.eps} must be at least 1e-6: below it, float32 rounding decides near hits"
            )
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, got {self.head_dim}; change it or set rope=False")
        if self.window < 0:
            raise ValueError(f"window={self.window} is negative; use 0 for no window")
        if self.shared_qk and self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"shared_qk=True needs as many key heads as query heads, got num_heads={self.num_heads} and "
                f"num_kv_heads={self.num_kv_heads}; make them equal"
            )


@register("inverse_distance")
class InverseDistanceAttention(Mixer):
    """Multi-head inverse distance weighting attention; its cache is a `KVCache`, rolling when there is a window."""

    Config: ClassVar[type[MixerConfig]] = InverseDistanceConfig
    paper: ClassVar[str] = "Inverse distance weighting attention, arXiv 2310.18805"
    masks: ClassVar[tuple[str, ...]] = (*Mixer.masks, "window")
    implementations: ClassVar[tuple] = IMPLEMENTATIONS

    def setup(self):
        c = self.config
        self.query = self.dense(c.num_heads * c.head_dim, "query")
        if not c.shared_qk:
            self.key = self.dense(c.num_kv_heads * c.head_dim, "key")
        self.value = self.dense(c.num_kv_heads * c.head_dim, "value")
        self.out = self.dense(self.hidden_size, "out")
        if c.qk_norm:
            rest = (c.head_dim, c.qk_norm_eps, False, self.param_dtype)
            self.query_norm = head_norm(c.num_heads, *rest, "query_norm")
            if not c.shared_qk:  # a norm of its own would take the keys off the queries
                self.key_norm = head_norm(c.num_kv_heads, *rest, "key_norm")
        if c.learn_power:
            self.power_bias = self._positive("power_bias", c.power or math.sqrt(2 * c.head_dim))
        if c.learn_eps:
            self.eps_bias = self._positive("eps_bias", c.eps)

    def _positive(self, name: str, start: float):
        """A parameter [H] whose softplus starts at `start`."""
        raw = start + math.log(-math.expm1(-start))
        return self.param(name, lambda _: jnp.full(self.config.num_heads, raw, self.param_dtype))

    def power(self) -> float | Array:
        c = self.config
        return jax.nn.softplus(self.power_bias) if c.learn_power else c.power or math.sqrt(2 * c.head_dim)

    def eps(self) -> float | Array:
        """Learned values are kept from 0, where the gradient has no bound."""
        return jnp.maximum(jax.nn.softplus(self.eps_bias), 1e-6) if self.config.learn_eps else self.config.eps

    def heads(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """q [B, T, H, D], k and v [B, T, K, D] of x [B, T, C]: projected, normed, then rotated."""
        c = self.config
        q, v = split_heads(self.query(x), c.num_heads), split_heads(self.value(x), c.num_kv_heads)
        q = self.query_norm(q) if c.qk_norm else q
        if c.shared_qk:
            k = q
        else:
            k = split_heads(self.key(x), c.num_kv_heads)
            k = self.key_norm(k) if c.qk_norm else k
        if c.rope:
            q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
        return q, k, v

    def attend(self, q: Array, k: Array, v: Array, mask: Mask) -> Array:
        c = self.config
        one_row = q.shape[1] == 1  # dense is linear in S then
        o = inverse_distance_attention(
            q, k, v, power=self.power(), eps=self.eps(), form=c.form, mask=mask,
            slopes=jnp.asarray(alibi_slopes(c.num_heads), jnp.float32) if c.alibi else None,
            center=c.center, exclude_self=c.exclude_self,
            implementation=c.implementation or ("reference" if one_row else None),
        )  # fmt: skip
        return self.out(merge_heads(o))

    def __call__(self, x, *, positions, segments=None, starts=None):
        c = self.config
        q, k, v = self.heads(x, positions)
        mask = Mask(window=c.window or None, q_segments=segments, kv_segments=segments, starts=starts)
        return self.attend(q, k, v, mask)

    def init_cache(self, batch, length, starts=None):
        c = self.config
        window = c.window or None
        return kv_cache.init_cache(
            batch, length, c.num_kv_heads, c.head_dim, self.dtype, window=window, starts=starts
        )

    def prefill(self, x, cache):
        c = self.config
        q, k, v = self.heads(x, kv_cache.new_positions(cache, x.shape[1]))
        (k, v, _, mask), cache = kv_cache.extend(cache, k, v, None, c.window or None)
        return kv_cache.poison_overflow(self.attend(q, k, v, mask), cache), cache

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        heads = (1 if c.shared_qk else 2) * c.num_kv_heads + 2 * c.num_heads
        seen = min(visible, c.window) if c.window else visible
        return 2 * hidden_size * c.head_dim * heads + 2 * 2 * c.num_heads * c.head_dim * seen

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        c = config
        return 2 * kv_cache.slots(length, c.window or None) * c.num_kv_heads * c.head_dim
