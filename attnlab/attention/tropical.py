"""Tropical attention (arXiv 2505.17190): hard, temperature-free attention in the max-plus semiring.

Letters: B batch, T queries, S keys, H heads, K key/value heads, D head size, C = H D channels; u tokens in log space,
W a max-plus matrix, lambda a learned threshold.

    u    = log(1 + max(x, 0)), then u - lambda or u - max_d u                          `valuation`, `apply_gauge`
    q_o  = max_i (u_i + W_oi), likewise k and v with their own W                       `tropical_linear`
    S_ij = -(max_d - min_d) of q_id - k_jd, the projective (Hilbert) metric            `tropical_scores`
    c_id = max_j (S_ij + v_jd),   o = exp(c) - 1                                       `tropical_attention`
    y    = W_out o                                                                     `MultiHeadTropicalAttention`

The paper has no causal form; ours are in `tropical_causal` and `tropical_scan`, diagnostics in `tropical_diagnostics`.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.heads import merge_heads, split_heads
from kernels.masks import Mask
from kernels.signatures import Array, Bool, Float, checked
from kernels.tropical import (
    SCORES,
    combine_contexts,
    devalue,
    maxplus_matmul,
    shift_winners,
    tropical_attention,
    tropical_scores,
)

__all__ = [
    "VARIANTS",
    "MHTAConfig",
    "MultiHeadTropicalAttention",
    "apply_gauge",
    "combine_contexts",
    "devalue",
    "drop_coordinates",
    "hilbert_distance",
    "map_heads",
    "maxplus_matmul",
    "mhta_params",
    "shift_winners",
    "torch_bias_init",
    "torch_linear_init",
    "trop_init",
    "tropical_attention",
    "tropical_linear",
    "tropical_scores",
    "valuation",
]

CHOICES = {
    "valuation": ("log1p", "log"),
    "devaluation": ("expm1", "exp"),
    "gauge": ("none", "lambda", "max"),
    "score": SCORES,
    "trop_init": ("normal", "evt", "identity"),
}
LOG_FLOOR = 1e-6  # of valuation "log"


def check_choices(options) -> None:
    """ValueError for a field of a config that is not one of CHOICES."""
    for name, known in CHOICES.items():
        value = getattr(options, name, known[0])
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, known))}")


@dataclasses.dataclass(frozen=True)
class MHTAConfig:
    """Options of multi-head tropical attention; the defaults are those of the paper's reported models."""

    qkv_linear: bool = False  # ordinary linear maps of x to queries, keys and values before the valuation
    tropical_proj: bool = True  # learned max-plus maps W of queries, keys and values
    per_head_trop: bool = False  # a W for each head, as written in the paper; the published code shares one
    gauge: str = "none"  # "lambda": subtract a learned threshold; "max": subtract each head's maximum
    valuation: str = "log1p"  # "log": log max(x, 1e-6), as written in the paper
    devaluation: str = "expm1"  # "exp", as written in the paper
    score: str = "hilbert"  # "hilbert_asym", "maxplus_dot" or "lse_dot"
    score_scale: float = 1.0
    trop_init: str = (
        "normal"  # of W: N(0, 1); "evt": centred for a maximum of D; "identity": near the identity
    )
    context_clip: float = 0.0  # upper bound of c, which expm1 needs below 88 in float32; 0: none
    smooth_beta: float = 0.0  # soften every maximum to (1 / beta) log sum exp(beta .); 0: hard
    coordinate_dropout: float = (
        0.0  # probability that a channel takes no part in a head's scores, in training
    )
    implementation: str = ""  # of the kernel, by name; "": the best for the platform compiled for

    def validate(self) -> None:
        """Raise ValueError, with the values, for options that do not go together."""
        check_choices(self)
        check_smoothing(self)
        if not 0 <= self.coordinate_dropout < 1:
            raise ValueError(f"coordinate_dropout={self.coordinate_dropout} must be in [0, 1)")
        if self.coordinate_dropout and (self.score in ("hilbert_asym", "lse_dot") or self.smooth_beta):
            raise ValueError(
                f"coordinate_dropout={self.coordinate_dropout} leaves channels out of maxima, but score={self.score!r} "
                f"with smooth_beta={self.smooth_beta} sums over channels; use a hard 'hilbert' or 'maxplus_dot'"
            )
        if self.trop_init != "normal" and not self.tropical_proj:
            raise ValueError(f"trop_init={self.trop_init!r} has no effect with tropical_proj=False")
        if self.per_head_trop and not self.tropical_proj:
            raise ValueError("per_head_trop=True has no effect with tropical_proj=False")


def check_smoothing(options) -> None:
    """ValueError for a negative smooth_beta or context_clip, or a beta beside a score that has its own."""
    if options.smooth_beta < 0 or options.context_clip < 0:
        raise ValueError(
            f"smooth_beta={options.smooth_beta} and context_clip={options.context_clip} must not be negative; 0 is none"
        )
    if options.smooth_beta and options.score == "lse_dot":
        raise ValueError(
            f"smooth_beta={options.smooth_beta} has no effect with score='lse_dot', which is smooth"
        )


VARIANTS = {"mhta": MHTAConfig(), "mhta_qkv": MHTAConfig(qkv_linear=True, gauge="lambda")}
"""The layer whose parameter count the paper's tables have, and that of its algorithm box and released models."""


def valuation(x: jax.Array, kind: str = "log1p") -> jax.Array:
    """Into log space: log(1 + max(x, 0)), or log(max(x, 1e-6)) for "log"; float32 at least. Any shape.

    No gradient where x is not positive (below 1e-6).
    """
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    if kind == "log1p":
        return jnp.log1p(jax.nn.relu(x))
    return jnp.log(jnp.where(x > LOG_FLOOR, x, LOG_FLOOR))


def apply_gauge(u: jax.Array, gauge: str, threshold: jax.Array | None = None) -> jax.Array:
    """u [..., H, D] as it is ("none"), less the threshold [H, D] ("lambda"), or less its maximum over D ("max").

    Scores of the Hilbert metric ignore what is subtracted from all channels alike; values keep it.
    """
    if gauge == "lambda":
        return u - threshold
    if gauge == "max":
        return u - jnp.take_along_axis(u, jnp.argmax(u, axis=-1, keepdims=True), axis=-1)
    return u


@checked
def tropical_linear(
    x: Float[Array, "*R I"], w: Float[Array, "O I"], *, implementation: str | None = None
) -> Float[Array, "*R O"]:
    """The max-plus linear map y_o = max_i (x_i + w_oi), the lowest i winning ties; x [..., I], w [O, I]."""
    rows = x.reshape(-1, x.shape[-1])
    return maxplus_matmul(rows, w.T, implementation=implementation).reshape(*x.shape[:-1], -1)


def map_heads(x: jax.Array, w: jax.Array, implementation: str | None = None) -> jax.Array:
    """`tropical_linear` of each head: x [B, T, H, D] with one w [D, D] for all heads, or [H, D, D]."""
    y = maxplus_matmul(x.swapaxes(1, 2), w.swapaxes(-1, -2), implementation=implementation)
    return y.swapaxes(1, 2)


def hilbert_distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """The projective metric max_d (x_d - y_d) - min_d (x_d - y_d) >= 0 of broadcasting x and y [..., D].

    Zero exactly where x - y is the same in all channels; no max-plus linear map makes it larger.
    """
    difference = x - y
    return difference.max(-1) - difference.min(-1)


def drop_coordinates(x: Float[Array, "B T H D"], keep: Bool[Array, "B H D"]) -> Float[Array, "B T H D"]:
    """Channels that are not kept repeat the first kept one of their head, so they decide no maximum or minimum.

    Zeros in their place could win. Apply it to queries and keys alike; if a head keeps none, it keeps channel 0.
    """
    channels = jnp.arange(keep.shape[-1])
    source = jnp.where(keep, channels, jnp.argmax(keep, axis=-1, keepdims=True))
    return jnp.take_along_axis(x, source[:, None], axis=-1)


def torch_linear_init(key, shape, dtype=jnp.float32):
    """Initialiser of a kernel [inputs, outputs]: uniform in +-1/sqrt(inputs), as in the published code."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


def torch_bias_init(inputs: int):
    """Initialiser of a bias beside a kernel of `inputs` inputs: uniform in +-1/sqrt(inputs)."""

    def draw(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    return draw


def trop_init(kind: str):
    """Initialiser of max-plus matrices [..., out, in].

    "normal": N(0, 1), as published; "evt": the same less sqrt(2 ln in), by which the maximum of so many numbers
    exceeds them, so that values do not drift up; "identity": 0 on the diagonal, -4 off it.
    """

    def draw(key, shape, dtype=jnp.float32):
        if kind == "identity":
            return jnp.broadcast_to(jnp.where(jnp.eye(*shape[-2:], dtype=bool), 0.0, -4.0), shape).astype(
                dtype
            )
        shift = math.sqrt(2 * math.log(shape[-1])) if kind == "evt" else 0.0
        return jax.random.normal(key, shape, dtype) - jnp.asarray(shift, dtype)

    return draw


class MultiHeadTropicalAttention(nn.Module):
    """Multi-head tropical attention over a set (section 2.2), or over a sequence with a mask.

    No positions and no order: permuting tokens permutes the result. All steps up to the devaluation are float32.
    """

    config: MHTAConfig
    hidden_size: int  # C
    num_heads: int  # H
    dtype: jnp.dtype = jnp.float32  # of the linear maps and of the result; parameters are param_dtype
    param_dtype: jnp.dtype = jnp.float32

    def setup(self):
        c, C, H = self.config, self.hidden_size, self.num_heads
        c.validate()
        if C % H:
            raise ValueError(f"hidden_size={C} is not a multiple of num_heads={H}; change one of them")
        dense = lambda name: nn.Dense(  # noqa: E731
            C,
            use_bias=False,
            name=name,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=torch_linear_init,
        )
        if c.qkv_linear:
            self.query, self.key, self.value = dense("query"), dense("key"), dense("value")
        if c.gauge == "lambda":
            self.lambda_param = self.param("lambda_param", nn.initializers.ones, (C,), self.param_dtype)
        if c.tropical_proj:
            shape = (H, C // H, C // H) if c.per_head_trop else (C // H, C // H)
            init, rest = trop_init(c.trop_init), (shape, self.param_dtype)
            self.query_trop = self.param("query_trop", init, *rest)
            self.key_trop = self.param("key_trop", init, *rest)
            self.value_trop = self.param("value_trop", init, *rest)
        self.out = dense("out")

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k, v [B, T, H, D] in log space, float32 at least, of x [B, T, C]."""
        c = self.config
        projected = (f(x) for f in (self.query, self.key, self.value)) if c.qkv_linear else (x, x, x)
        threshold = self.lambda_param.reshape(self.num_heads, -1) if c.gauge == "lambda" else None
        u = [
            apply_gauge(split_heads(valuation(p, c.valuation), self.num_heads), c.gauge, threshold)
            for p in projected
        ]
        if not c.tropical_proj:
            return tuple(u)
        maps = (self.query_trop, self.key_trop, self.value_trop)
        return tuple(map_heads(x, w, c.implementation or None) for x, w in zip(u, maps, strict=True))

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: Mask = Mask(causal=False),  # noqa: B008 (frozen)
        bias: jax.Array | None = None,
        return_scores: bool = False,
        deterministic: bool = True,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """x [B, T, C] -> y [B, T, C], and with return_scores the scores [B, H, T, T] before mask and bias.

        bias broadcasts to [B, H, T, T] and is added to the scores, -inf hides a key; tokens that see nothing give 0.
        With deterministic=False and coordinate_dropout, channels are drawn from the "dropout" key.
        """
        c = self.config
        q, k, v = self.heads(x)
        if c.coordinate_dropout and not deterministic:
            shape = (q.shape[0], *q.shape[2:])
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - c.coordinate_dropout, shape)
            q, k = drop_coordinates(q, keep), drop_coordinates(k, keep)
        options = {"score": c.score, "score_scale": c.score_scale, "smooth_beta": c.smooth_beta or None}
        o = tropical_attention(
            q, k, v, mask=mask, bias=bias, context_clip=c.context_clip or None, devaluation=c.devaluation,
            implementation=c.implementation or None, **options,
        )  # fmt: skip
        y = self.out(merge_heads(o).astype(self.dtype))
        return (y, tropical_scores(q, k, **options)) if return_scores else y


def mhta_params(weights: dict[str, np.ndarray]) -> dict:
    """Published weights of the layer, by their published names, as parameters of `MultiHeadTropicalAttention`.

    "query_trop.W" [out, in] -> query_trop, "lambda_param" [1, 1, C] -> [C], "out.weight" [out, in] -> out/kernel
    [in, out], "query_linear.weight" -> query/kernel. ValueError for a name it does not know.
    """
    params = {}
    for name, x in weights.items():
        stem, _, kind = name.partition(".")
        if name == "lambda_param":
            params[name] = x.reshape(-1)
        elif kind == "W" and stem.endswith("_trop"):
            params[stem] = x
        elif kind == "weight" and (stem == "out" or stem.endswith("_linear")):
            params[stem.removesuffix("_linear")] = {"kernel": x.T}
        else:
            raise ValueError(f"{name!r} is no weight of multi-head tropical attention")
    return params
