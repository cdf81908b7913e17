"""Encoders of sets and graphs: a small transformer without positions, with tropical or softmax attention.

Tropical Attention, arXiv 2505.17190, section 4 and its published code. Letters: B batch, T tokens, F features, C
channels, H heads, D = C / H, L layers, Y outputs.

    x = W_in f + b_in                                                        f [B, T, F]
    post-norm layer (default):  x = LN(x + drop(attention(x)));  x = LN(x + drop(W_down relu(W_up x)))
    pre-norm layer:             x = x + drop(attention(LN(x)));  x = x + drop(W_down relu(W_up LN(x)));  LN at the end
    y = W_head x + b_head        of every token, or of the mean over tokens

Nothing depends on the order of the tokens, and keys at padding are never seen.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnlab.attention.adaptive import adaptive_softmax
from attnlab.attention.heads import merge_heads, split_heads
from attnlab.attention.softmax import softmax_attention
from attnlab.attention.tropical import (
    VARIANTS,
    MHTAConfig,
    MultiHeadTropicalAttention,
    torch_bias_init,
    torch_linear_init,
)
from attnlab.models.config import DTYPES
from kernels import masks
from kernels.masks import Mask
from kernels.signatures import Array, Bool, Float, checked

ATTENTIONS = ("tropical", "vanilla", "adaptive")


@dataclasses.dataclass(frozen=True)
class SetEncoderConfig:
    """One encoder; the defaults are the paper's sizes and its default variant of tropical attention."""

    features: int = 2  # F
    hidden_size: int = 64  # C
    num_heads: int = 2  # H
    num_layers: int = 1  # L
    attention: str = "tropical"  # or "vanilla": softmax; "adaptive": softmax with adaptive temperature
    mhta: MHTAConfig = MHTAConfig()  # options of attention="tropical"
    pooled: bool = False  # one output an instance, of the mean over tokens; False: one a token
    num_outputs: int = 1  # Y; classes of each token or instance
    regression: bool = False  # drop the axis Y of size 1
    pre_norm: bool = False
    share_attn_across_layers: bool = False  # one attention for all layers, as in the published code
    published_final_norm: bool = False  # post-norm too has the final norm's weights, unused, as published
    dropout: float = 0.0
    norm_eps: float = 1e-5
    dtype: str = "float32"  # of activations; scores, norms and outputs are at least float32
    implementation: str = ""  # of the attention kernel; "": the best for the platform

    def validate(self) -> None:
        """ValueError, with the values, for options that do not go together."""
        for name in ("features", "hidden_size", "num_heads", "num_layers", "num_outputs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; change one"
            )
        if self.attention not in ATTENTIONS:
            raise ValueError(
                f"attention={self.attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}"
            )
        if self.attention != "tropical" and self.mhta != MHTAConfig():
            raise ValueError(f"mhta has no effect with attention={self.attention!r}; leave it at its default")
        if self.attention == "adaptive" and self.implementation:
            raise ValueError(
                f"implementation={self.implementation!r}: adaptive attention is dense; leave it empty"
            )
        if self.regression and self.num_outputs > 1:
            raise ValueError(
                f"regression=True has one output, got num_outputs={self.num_outputs}; set it to 1"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if self.pre_norm and self.published_final_norm:
            raise ValueError("published_final_norm=True has no effect with pre_norm=True; leave it False")
        self.mhta.validate()


# name: (attention, options of tropical attention); the paper's rows, and the variants of its code
ENCODERS = {
    "mhta": ("tropical", VARIANTS["mhta"]),
    "mhta_lambda": ("tropical", dataclasses.replace(VARIANTS["mhta"], gauge="lambda")),
    "mhta_qkv": ("tropical", VARIANTS["mhta_qkv"]),
    "vanilla": ("vanilla", MHTAConfig()),
    "adaptive": ("adaptive", MHTAConfig()),
}


def set_encoder_preset(name: str, **changes) -> SetEncoderConfig:
    """The paper's encoder (C = 64, H = 2, L = 1, post-norm) with the attention `name`; `changes` replace fields.

    With the unused final norm of the published code, so that parameters count as in the paper's table 2: 40,961
    ("mhta") and 50,177 ("vanilla", "adaptive") for F = 3. ValueError for an unknown name.
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; known: {', '.join(ENCODERS)}")
    attention, mhta = ENCODERS[name]
    config = SetEncoderConfig(
        attention=attention, mhta=mhta, published_final_norm=not changes.get("pre_norm")
    )
    return dataclasses.replace(config, **changes)


@checked
def dense_adaptive_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S H D"],
    v: Float[Array, "B S H Dv"],
    *,
    mask: Mask = Mask(causal=False),  # noqa: B008 (frozen)
) -> Float[Array, "B T H Dv"]:
    """o_i = sum_j adaptive_softmax_j(q_i . k_j / sqrt(D)) v_j, the entropy taken exactly as in the published code.

    Dense in T and S, which are small here. Rows that see no key give zeros. Result in q's dtype.
    """
    B, T, _, D = q.shape
    S = k.shape[1]
    mask = masks.validate(mask, B, T, S)
    wide = jnp.promote_types(jnp.float32, q.dtype)
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=wide) / D**0.5
    weights = adaptive_softmax(scores, masks.dense(mask, T, S)[:, None])
    return jnp.einsum("bhts,bshd->bthd", weights, v.astype(wide)).astype(q.dtype)


def _dense(
    features: int, inputs: int, name: str, config: SetEncoderConfig, use_bias: bool = True
) -> nn.Dense:
    """A linear layer with the published init: weights and bias uniform in +-1 / sqrt(inputs)."""
    dtype = DTYPES[config.dtype]
    return nn.Dense(
        features,
        use_bias=use_bias,
        name=name,
        dtype=dtype,
        param_dtype=jnp.promote_types(jnp.float32, dtype),
        kernel_init=torch_linear_init,
        bias_init=torch_bias_init(inputs),
    )


def _layer_norm(name: str, config: SetEncoderConfig) -> nn.LayerNorm:
    dtype = DTYPES[config.dtype]
    wide = jnp.promote_types(jnp.float32, dtype)
    return nn.LayerNorm(config.norm_eps, dtype=dtype, param_dtype=wide, use_fast_variance=False, name=name)


class SetSoftmaxAttention(nn.Module):
    """Multi-head softmax attention over all tokens, [B, T, C] -> [B, T, C]; no biases, scale 1 / sqrt(D)."""

    config: SetEncoderConfig

    @nn.compact
    def __call__(self, x: Array, *, mask: Mask, deterministic: bool = True) -> Array:
        """`deterministic` is there for its tropical counterpart; nothing here is random."""
        c = self.config
        q, k, v = (
            split_heads(_dense(c.hidden_size, c.hidden_size, name, c, use_bias=False)(x), c.num_heads)
            for name in ("query", "key", "value")
        )
        if c.attention == "adaptive":
            o = dense_adaptive_attention(q, k, v, mask=mask)
        else:
            o = softmax_attention(q, k, v, mask=mask, implementation=c.implementation or None)
        return _dense(c.hidden_size, c.hidden_size, "out", c, use_bias=False)(merge_heads(o))


def make_attention(config: SetEncoderConfig, name: str) -> nn.Module:
    """The attention module of a config; all are called as attention(x, mask=, deterministic=)."""
    c = config
    if c.attention != "tropical":
        return SetSoftmaxAttention(c, name=name)
    dtype = DTYPES[c.dtype]
    options = dataclasses.replace(c.mhta, implementation=c.implementation) if c.implementation else c.mhta
    return MultiHeadTropicalAttention(
        config=options,
        hidden_size=c.hidden_size,
        num_heads=c.num_heads,
        dtype=dtype,
        param_dtype=jnp.promote_types(jnp.float32, dtype),
        name=name,
    )


class FeedForward(nn.Module):
    """W_down relu(W_up x + b_up) + b_down, inner width 4C."""

    config: SetEncoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        inner = jax.nn.relu(_dense(4 * c.hidden_size, c.hidden_size, "up", c)(x))
        return _dense(c.hidden_size, 4 * c.hidden_size, "down", c)(inner)


class EncoderLayer(nn.Module):
    """One layer; `shared` is an attention owned by the encoder, None for one of the layer's own."""

    config: SetEncoderConfig
    shared: nn.Module | None = None

    @nn.compact
    def __call__(self, x: Array, mask: Mask, deterministic: bool) -> Array:
        c = self.config
        attention = make_attention(c, "attention") if self.shared is None else self.shared
        parts: list[tuple[str, Callable[[Array], Array]]] = [
            ("attention_norm", lambda z: attention(z, mask=mask, deterministic=deterministic)),
            ("feed_forward_norm", FeedForward(c, name="feed_forward")),
        ]
        for name, part in parts:
            norm, drop = _layer_norm(name, c), nn.Dropout(c.dropout, deterministic=deterministic)
            x = x + drop(part(norm(x))) if c.pre_norm else norm(x + drop(part(x)))
        return x


class SetEncoder(nn.Module):
    """The whole encoder. Outputs are float32 (float64 in float64 models)."""

    config: SetEncoderConfig

    @nn.compact
    @checked
    def __call__(
        self,
        x: Float[Array, "B T F"],
        mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Array:
        """x [B, T, F]; mask [B, T], True at real tokens (all by default); returns

            pooled        [B, Y], or [B] with regression
            not pooled    [B, T, Y], or [B, T] with regression; at padding the values mean nothing

        Instances without a real token are pooled to the head's bias. Randomness (dropout, coordinate dropout) needs
        deterministic=False and an rng "dropout". ValueError for F other than config.features.
        """
        c = self.config
        c.validate()
        if x.shape[-1] != c.features:
            raise ValueError(
                f"x has {x.shape[-1]} features, the encoder is made for {c.features}; change one"
            )
        dtype = DTYPES[c.dtype]
        h = _dense(c.hidden_size, c.features, "input", c)(x.astype(dtype))
        segments = None if mask is None else mask.astype(jnp.int32)
        visible = Mask(causal=False, q_segments=segments, kv_segments=segments)
        shared = make_attention(c, "attention") if c.share_attn_across_layers else None
        for i in range(c.num_layers):
            h = EncoderLayer(c, shared, name=f"layers_{i}")(h, visible, deterministic)
        if c.pre_norm or c.published_final_norm:
            normed = _layer_norm("final_norm", c)(h)
            h = normed if c.pre_norm else h
        return self.readout(h.astype(jnp.promote_types(jnp.float32, dtype)), mask)

    def readout(self, h: Array, mask: Array | None) -> Array:
        """h [B, T, C], at least float32 -> outputs."""
        c = self.config
        if c.pooled:
            h = masked_mean(h, mask)
        wide = dataclasses.replace(c, dtype="float64" if c.dtype == "float64" else "float32")
        y = _dense(c.num_outputs, c.hidden_size, "head", wide)(h)
        return y[..., 0] if c.regression else y


def masked_mean(h: Array, mask: Array | None) -> Array:
    """Mean of h [B, T, C] over the tokens where mask [B, T] is True (all by default), zeros where none is: [B, C]."""
    if mask is None:
        return h.mean(axis=1)
    count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1).astype(h.dtype)
    return jnp.sum(h, axis=1, where=mask[..., None]) / count
