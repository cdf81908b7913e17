"""Softplus attention with re-weighting (LSSA, LSSAR), arXiv 2501.13428: attention that does not spread out with length.

Softmax's exp becomes softplus and its scores cosines, scaled by log D log n; re-weighting then keeps the keys above the
row's mean and raises their excess to the power p. No parameters are added.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, C channels; i a query row, j a key,
n_i the keys row i sees (i + 1 in a plain causal row; packed documents and padding count for themselves).

    q^_i = q_i / |q_i|,  k^_j = k_j / |k_j|                                       `unit_vectors`, after the rotation
    a_ij = softplus(log D log n_i q^_i . k^_j)
    P_ij = a_ij / sum_j a_ij                                   o_i = sum_j P_ij v_j        `lssa`     (v5, equation 4)
    w_ij = max(n_i P_ij - O_i, 0)^p,   O_i = 1 (0 if n_i <= 3)
    R_ij = w_ij / sum_j w_ij                                   o_i = sum_j R_ij v_j        `lssar`    (v5, equation 5)

Row sums and powers are in `kernels.softplus`; the baselines and ablations of the paper in `normalised_family.py`.
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnlab.attention import kv_cache
from attnlab.attention.attention_metrics import attention_metrics
from attnlab.attention.heads import merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig, register
from attnlab.attention.normalised_family import (
    Form,
    family_attention,
    find_form,
    unit_vectors,
)
from attnlab.attention.rotary import rotate
from kernels.masks import Mask
from kernels.signatures import Array, Float, checked
from kernels.softplus import IMPLEMENTATIONS
from kernels.softplus.arguments import DEGENERATE
from kernels.softplus.splits import (
    FirstSums,
    SecondSums,
    finish_first,
    finish_second,
    first_sums,
    join_first,
    join_second,
    second_sums,
)

__all__ = [
    "FirstSums", "SecondSums", "SoftplusAttention", "SoftplusConfig", "finish_first", "finish_second", "first_sums",
    "join_first", "join_second", "lssa", "lssar", "second_sums", "softplus_attention",
]  # fmt: skip

QK_NORM = {"": None, "on": True, "off": False}
RE_WEIGHTING = {"offset": 1.0, "warm_rows": 3, "degenerate": "zero", "power_learned": False}


@dataclasses.dataclass(frozen=True)
class SoftplusConfig(MixerConfig):
    """Options of the layer. Those that default to "" or 0 take the variant's value; anything else replaces it.

    `reweight` may be switched after training: no parameter depends on it. Training with False and evaluating with True
    is the inference-time power transform of the paper's second version (with offset 0 or 1); the layer never guesses
    whether it is being evaluated. The paper's fifth version trains and evaluates with it.
    """

    variant: str = "lssar"  # a name of FORMS: "lssa", "lssar" or a baseline such as "softmax" or "sigmoid"
    phi: str = ""
    phi_power: float = 0.0
    scale: str = ""
    bias: str = ""
    normalise: str = ""
    qk_norm: str = ""  # "on", "off"
    power: float = 0.0  # p, 15 in "lssar"
    power_learned: bool = False  # one p a head, starting from the variant's
    reweight: bool = True  # False: stage 1 alone
    offset: float = 1.0  # O_i
    warm_rows: int = 3  # rows with so few keys have O_i = 0
    degenerate: str = "zero"  # rows of equal weights: "zero", or "lssa" for their stage 1
    logit_gain: float = 0.0  # in place of log D
    ssmax_length: int = 1024  # scalable softmax starts from s_h = 1 / log of this
    fixed_count: int = 0  # n of every row; 0: the keys it sees
    rope: bool = True
    rope_theta: float = 10_000.0
    window: int = 0  # a query sees the last `window` positions, its own included; 0: all before it

    def form(self) -> Form:
        """The member of the family this layer computes, re-weighting included whatever `reweight` says."""
        given = {n: getattr(self, n) for n in ("phi", "phi_power", "scale", "bias", "normalise", "power")}
        changes = {name: value for name, value in given.items() if value}
        if self.qk_norm:
            changes["qk_norm"] = QK_NORM[self.qk_norm]
        return dataclasses.replace(find_form(self.variant), **changes)

    def validate(self) -> None:
        if self.qk_norm not in QK_NORM:
            raise ValueError(f"qk_norm={self.qk_norm!r} is unknown; use 'on', 'off', or '' for the variant's")
        form = self.form()
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, got {self.head_dim}; change it or set rope=False")
        for name in ("window", "fixed_count", "power", "offset", "warm_rows", "phi_power", "logit_gain"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; it must be at least 0")
        if self.degenerate not in DEGENERATE:
            raise ValueError(
                f"degenerate={self.degenerate!r} is unknown; choose one of {', '.join(map(repr, DEGENERATE))}"
            )
        if form.phi_power != 1 and (form.phi != "relu" or form.phi_power < 1):
            raise ValueError(
                f"phi_power={form.phi_power} must be at least 1 and needs phi='relu', got {form.phi=}"
            )
        self._check_effect(form)

    def _check_effect(self, form: Form) -> None:
        """Options that the form has no use for are refused."""
        for name, default in RE_WEIGHTING.items():
            if form.power is None and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to re-weighting, which variant={self.variant!r} "
                    "does not have; set power"
                )
        if not self.reweight and form.power is None:
            raise ValueError(f"reweight=False changes nothing in variant={self.variant!r}; leave it True")
        if self.logit_gain and "logd" not in form.scale:
            raise ValueError(
                f"logit_gain={self.logit_gain} replaces log D, which {form.scale=} does not have"
            )
        if self.ssmax_length != 1024 and not form.learns_scale or self.ssmax_length < 2:
            raise ValueError(
                f"ssmax_length={self.ssmax_length} must be at least 2 and belongs to variant='ssmax', got "
                f"{form.scale=}; leave it at 1024"
            )
        if self.fixed_count and not form.uses_count:
            raise ValueError(f"fixed_count={self.fixed_count} changes nothing in {form}; set it to 0")


@checked
def softplus_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    power: float | None = 15.0,
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    offset: float = 1.0,
    warm_rows: int = 3,
    degenerate: str = "zero",
    logit_gain: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"]:
    """LSSAR with power p, or LSSA with power=None, of raw queries and keys (arXiv 2501.13428v5, equations 4 and 5).

    Args:
        q, k, v: any one float dtype; q and k are brought to unit length here. K divides H.
        power: p; the paper reports 15 and 3.
        mask: visibility; causal by default. n_i is the number of keys it lets row i see.
        offset, warm_rows: O_i = offset in rows with n_i > warm_rows, else 0.
        degenerate: rows whose weights are all equal, and so have no key above their mean: "zero" output, or "lssa".
        logit_gain: in place of log D.
        implementation: "blockwise" (memory linear in T and S), "reference" (dense), None for the platform's best.

    Returns: o in q's dtype; zero in rows that see no key.

    Raises: ValueError for shapes that do not fit, an unknown option, a power that is not positive.
    """
    return family_attention(
        q, k, v, Form(power=power), mask=mask, offset=offset, warm_rows=warm_rows, degenerate=degenerate,
        logit_gain=logit_gain, implementation=implementation,
    )  # fmt: skip


def lssa(q: Array, k: Array, v: Array, **options) -> Array:
    """`softplus_attention` without re-weighting (equation 4)."""
    return softplus_attention(q, k, v, None, **options)


def lssar(q: Array, k: Array, v: Array, power: float = 15.0, **options) -> Array:
    """`softplus_attention` with re-weighting (equation 5)."""
    return softplus_attention(q, k, v, power, **options)


@register("softplus")
class SoftplusAttention(Mixer):
    """LSSA, LSSAR or any other member of the family as a mixer; keys are cached rotated and at unit length.

    With the collection "intermediates" mutable, the parallel form stores `attention_metrics` of the layer there.
    """

    Config: ClassVar[type[MixerConfig]] = SoftplusConfig
    paper: ClassVar[str] = "Softplus attention (LSSAR), arXiv 2501.13428"
    masks: ClassVar[tuple[str, ...]] = (*Mixer.masks, "window")
    implementations: ClassVar[tuple] = IMPLEMENTATIONS

    def setup(self):
        c, form = self.config, self.config.form()
        self.query = self.dense(c.num_heads * c.head_dim, "query")
        self.key = self.dense(c.num_kv_heads * c.head_dim, "key")
        self.value = self.dense(c.num_kv_heads * c.head_dim, "value")
        self.out = self.dense(self.hidden_size, "out")
        if form.learns_scale:
            start = nn.initializers.constant(1 / math.log(c.ssmax_length))
            self.ssmax_scale = self.param("ssmax_scale", start, (c.num_heads,), self.param_dtype)
        if c.power_learned:  # p = softplus(power_bias), also there when reweight is off
            start = nn.initializers.constant(form.power + math.log(-math.expm1(-form.power)))
            self.power_bias = self.param("power_bias", start, (c.num_heads,), self.param_dtype)

    def heads(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """q [B, T, H, D], k and v [B, T, K, D] of x [B, T, C]: projected, rotated, then at unit length."""
        c = self.config
        q = split_heads(self.query(x), c.num_heads)
        k = split_heads(self.key(x), c.num_kv_heads)
        v = split_heads(self.value(x), c.num_kv_heads)
        if c.rope:
            q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
        return (unit_vectors(q), unit_vectors(k), v) if c.form().qk_norm else (q, k, v)

    def family_options(self) -> dict:
        """Arguments of `family_attention` for queries and keys that `heads` has prepared."""
        c = self.config
        form = dataclasses.replace(c.form(), qk_norm=False)
        learned_power = None
        if c.power_learned and c.reweight:
            wide = jnp.promote_types(jnp.float32, self.power_bias.dtype)
            learned_power = jax.nn.softplus(self.power_bias.astype(wide))
        return {
            "form": form if c.reweight else dataclasses.replace(form, power=None),
            "learned_scale": self.ssmax_scale if form.learns_scale else None,
            "learned_power": learned_power,
            "logit_gain": c.logit_gain or None,
            "counts": float(c.fixed_count) if c.fixed_count else None,
            "offset": c.offset,
            "warm_rows": c.warm_rows,
            "degenerate": c.degenerate,
        }

    def attend(self, q: Array, k: Array, v: Array, mask: Mask) -> Array:
        one_row = q.shape[1] == 1  # dense is linear in S then
        name = self.config.implementation or ("reference" if one_row else None)
        return family_attention(q, k, v, **self.family_options(), mask=mask, implementation=name)

    def __call__(self, x, *, positions, segments=None, starts=None):
        q, k, v = self.heads(x, positions)
        window = self.config.window or None
        mask = Mask(window=window, q_segments=segments, kv_segments=segments, starts=starts)
        if self.is_mutable_collection("intermediates"):
            metrics = attention_metrics(q, k, **self.family_options(), mask=mask)
            self.sow("intermediates", "attention_metrics", metrics)
        return self.out(merge_heads(self.attend(q, k, v, mask)))

    def init_cache(self, batch, length, starts=None):
        c = self.config
        return kv_cache.init_cache(
            batch, length, c.num_kv_heads, c.head_dim, self.dtype, window=c.window or None, starts=starts
        )

    def prefill(self, x, cache):
        q, k, v = self.heads(x, kv_cache.new_positions(cache, x.shape[1]))
        (k, v, _, mask), cache = kv_cache.extend(cache, k, v, None, self.config.window or None)
        y = self.out(merge_heads(self.attend(q, k, v, mask)))
        return kv_cache.poison_overflow(y, cache), cache

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        projections = 2 * hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        seen = min(visible, c.window) if c.window else visible
        return projections + 2 * 2 * c.num_heads * c.head_dim * seen

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        c = config
        return 2 * kv_cache.slots(length, c.window or None) * c.num_kv_heads * c.head_dim
