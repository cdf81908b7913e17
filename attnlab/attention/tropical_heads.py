"""Queries, keys and values in log space: what the causal mixers of tropical attention share.

Letters: B batch, T length, C channels, H query heads, K key/value heads, D head size; W max-plus matrices.

    x -> linear map -> rotary (optional) -> valuation -> gauge -> W            and back: c -> clip -> devaluation
All of it is ours: the paper (arXiv 2505.17190) has no causal form.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attnlab.attention.heads import head_norm, merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig
from attnlab.attention.rotary import rotate
from attnlab.attention.tropical import apply_gauge, check_choices, devalue, map_heads, trop_init, valuation

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TropicalHeadsConfig(MixerConfig):
    valuation: str = "log1p"  # log(1 + max(x, 0)); "log": log max(x, 1e-6)
    devaluation: str = "expm1"  # or "exp"
    gauge: str = "none"  # "lambda": subtract a learned threshold; "max": subtract each head's maximum
    tropical_proj: bool = True  # learned max-plus maps W
    per_head_trop: bool = False  # a W for each head instead of one for all
    trop_init: str = (
        "identity"  # every channel starts with a gradient; "normal" and "evt" start with few winners
    )
    context_clip: float = 15.0  # upper bound of c, as expm1 grows without end; 0: none
    output_norm: bool = False  # RMS norm of each head's output

    def validate(self) -> None:
        check_choices(self)
        if self.context_clip < 0:
            raise ValueError(f"context_clip={self.context_clip} must not be negative; 0 is none")
        if not self.tropical_proj and (self.per_head_trop or self.trop_init != "identity"):
            raise ValueError(
                f"per_head_trop={self.per_head_trop} and trop_init={self.trop_init!r} have no effect with "
                "tropical_proj=False; leave them at their defaults"
            )


@dataclasses.dataclass(frozen=True)
class RotaryTropicalConfig(TropicalHeadsConfig):
    rope: bool = False  # rotate queries and keys by their positions before the valuation
    rope_theta: float = 500_000.0

    def validate(self) -> None:
        super().validate()
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, got {self.head_dim}; change it or set rope=False")


def head_slopes(num_heads: int) -> np.ndarray:
    """Loss of score per position of distance, [H]: 2^(-8 h / H) for h = 1 .. H, as in ALiBi (arXiv 2108.12409)."""
    return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)


def inverse_softplus(x: np.ndarray) -> np.ndarray:
    """log(e^x - 1) of positive numbers, any shape."""
    return x + np.log(-np.expm1(-x))


class TropicalHeads(Mixer):
    """Base of the causal mixers: projections into log space and back."""

    @property
    def wide(self):
        return jnp.promote_types(jnp.float32, self.dtype)

    @property
    def kernel(self) -> str | None:
        return self.config.implementation or None

    def wide_dense(self, features: int, name: str, bias: np.ndarray) -> nn.Dense:
        """A projection in float32 whose bias starts at `bias` [features]: its results are summed over the sequence."""
        start = jnp.asarray(bias, self.param_dtype)
        return nn.Dense(
            features,
            name=name,
            dtype=self.wide,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(self.init_std),
            bias_init=lambda *_: start,
        )

    def setup_maps(self, names: dict[str, int]) -> None:
        """Max-plus matrices `<name>_trop` for heads of each name, and the threshold of gauge "lambda"."""
        c, D = self.config, self.config.head_dim
        if c.tropical_proj:
            for name, heads in names.items():
                shape = (heads, D, D) if c.per_head_trop else (D, D)
                setattr(
                    self,
                    f"{name}_trop",
                    self.param(f"{name}_trop", trop_init(c.trop_init), shape, self.param_dtype),
                )
        if c.gauge == "lambda":
            heads = min(names.values())
            self.lambda_param = self.param(
                "lambda_param", nn.initializers.ones, (heads * D,), self.param_dtype
            )

    def to_log_space(self, x: Array, name: str) -> Array:
        """Valuation, gauge and max-plus map of the heads `name`, x [B, T, heads, D]; float32 at least."""
        c = self.config
        threshold = None
        if c.gauge == "lambda":  # one threshold a key/value head; query heads of a group share it
            threshold = self.lambda_param.reshape(-1, c.head_dim)
            threshold = jnp.repeat(threshold, x.shape[2] // threshold.shape[0], axis=0)
        u = apply_gauge(valuation(x, c.valuation), c.gauge, threshold)
        return map_heads(u, getattr(self, f"{name}_trop"), self.map_kernel) if c.tropical_proj else u

    @property
    def map_kernel(self) -> str | None:
        return self.kernel

    def setup_attention(self) -> None:
        """Projections of a mixer with queries, keys and values."""
        c = self.config
        self.query = self.dense(c.num_heads * c.head_dim, "query")
        self.key = self.dense(c.num_kv_heads * c.head_dim, "key")
        self.value = self.dense(c.num_kv_heads * c.head_dim, "value")
        self.setup_output()

    def setup_output(self) -> None:
        c = self.config
        self.out = self.dense(self.hidden_size, "out")
        if c.output_norm:
            self.output_norm = head_norm(
                c.num_heads, c.head_dim, self.norm_eps, False, self.param_dtype, "output_norm"
            )

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """q [B, T, H, D], k and v [B, T, K, D] of x [B, T, C], rotated if asked for, before the valuation."""
        c = self.config
        q = split_heads(self.query(x), c.num_heads)
        k, v = (split_heads(f(x), c.num_kv_heads) for f in (self.key, self.value))
        if c.rope:
            q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
        return q, k, v

    def from_log_space(self, context: Array) -> Array:
        """o of a context c [B, T, H, D] (-inf gives 0)."""
        c = self.config
        return devalue(context, c.devaluation, c.context_clip or None)

    def readout(self, o: Array) -> Array:
        """o [B, T, H, D] -> y [B, T, C]."""
        o = o.astype(self.dtype)
        return self.out(merge_heads(self.output_norm(o) if self.config.output_norm else o))


def map_flops(config, heads: int) -> float:
    """Additions and comparisons a token of the max-plus maps of `heads` heads."""
    return 2 * heads * config.head_dim**2 if config.tropical_proj else 0
