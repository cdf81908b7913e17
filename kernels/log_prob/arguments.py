"""The canonical form of a call to token_log_probs: checked once here, trusted everywhere below.

Letters: B batch, T length, N = B T rows, D hidden size, V vocabulary; n a row, v a token, x the logits after cap and
temperature, z before.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LOWEST = -1e30  # stands for -inf where an infinite difference times zero would be NaN


def static(**options):
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass(frozen=True)
class BlockSizes:
    """Rows and tokens of a block of logits; nothing larger than such a block is ever held of them."""

    rows: int
    vocab: int

    def __post_init__(self):
        if not all(isinstance(size, int) and size > 0 for size in (self.rows, self.vocab)):
            raise ValueError(
                f"block sizes rows={self.rows!r}, vocab={self.vocab!r} must be positive integers"
            )


@dataclass(frozen=True)
class Options:
    """The static choices of a call; vocab_axis is the weight's axis of size V."""

    temperature: float
    soft_cap: float
    vocab_axis: int
    entropy: bool
    argmax: bool
    block_sizes: BlockSizes | None

    def logits(self, z: jax.Array) -> jax.Array:
        """x = cap tanh(z / cap) / temperature."""
        if self.soft_cap:
            z = self.soft_cap * jnp.tanh(z * (1 / self.soft_cap))
        return z if self.temperature == 1 else z * (1 / self.temperature)

    def slope(self, x: jax.Array) -> jax.Array | float:
        """dx / dz at logits x."""
        if not self.soft_cap:
            return 1 / self.temperature
        return (1 - (x * (self.temperature / self.soft_cap)) ** 2) * (1 / self.temperature)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """What every implementation receives: hidden [B, T, D], weight [D, V] or [V, D], labels int32 [B, T] (-1: none)."""

    hidden: jax.Array
    weight: jax.Array
    labels: jax.Array
    options: Options = static()


class Outputs(NamedTuple):
    """What every implementation returns, all [B, T]; entropy and argmax are None where they are not asked for."""

    logp: jax.Array
    lse: jax.Array
    entropy: jax.Array | None
    argmax: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shard:
    """What a kernel works on, a device's share: h [N, D], w of the same dtype, labels int32 [N], counted within w.

    A label of -1 is no token of this share.
    """

    h: jax.Array
    w: jax.Array
    labels: jax.Array
    options: Options = static()

    @property
    def vocab(self) -> int:
        return self.w.shape[self.options.vocab_axis]

    @property
    def accumulator(self) -> jnp.dtype:
        """float32, or float64 for float64 operands: logits, sums and gradients within a kernel."""
        return jnp.promote_types(jnp.float32, self.h.dtype)


class Statistics(NamedTuple):
    """Of the logits of a row met so far, all [N]: m the largest, s = sum e^(x-m), u = sum e^(x-m) (x-m), y the label's.

    u is None without entropy, index (the first place of m, int32) without argmax.
    """

    m: jax.Array
    s: jax.Array
    u: jax.Array | None
    y: jax.Array
    index: jax.Array | None


class RowGradients(NamedTuple):
    """What the gradient of a row's logits needs, all [N]; see `logit_gradient`. entropy is None without entropy."""

    lse: jax.Array
    label: jax.Array
    mass: jax.Array
    entropy: jax.Array | None


class Kernel(NamedTuple):
    """forward(shard) -> Statistics; backward(shard, RowGradients) -> dh [N, D] and dw like w, both accumulated wide."""

    forward: Callable[[Shard], Statistics]
    backward: Callable[[Shard, RowGradients], tuple[Any, Any]]


def logit_gradient(x, is_label, rows: RowGradients):
    """dx = g_y 1[v = label] + p (mass - g_H (x - lse)), p = e^(x - lse), with mass = g_lse - g_logp - g_H H.

    Equal to the specification's g_logp (1[v = label] - p) - g_H p (x - lse + H) + g_lse p; rows broadcast against x.
    """
    shifted = jnp.minimum(x - rows.lse, 0)  # at most 0 but for rounding; padding of a block may exceed it
    mass = rows.mass if rows.entropy is None else rows.mass - rows.entropy * shifted
    return jnp.where(is_label, rows.label, 0) + jnp.exp(shifted) * mass


def canonicalize(
    hidden, weight, labels, *, mask, vocab_axis, temperature, soft_cap, entropy, argmax, block_sizes
) -> tuple[Arguments, jax.Array]:
    """Arguments, and which rows count, bool [B, T] (or [N, 1]); see the public docstring for errors."""
    if hidden.ndim == 2:
        hidden, labels = hidden[:, None], labels[:, None]
        mask = None if mask is None else mask[:, None]
    _check(hidden, weight, vocab_axis, temperature, soft_cap)
    counted = labels >= 0 if mask is None else mask & (labels >= 0)
    options = Options(float(temperature), float(soft_cap), vocab_axis % 2, entropy, argmax, block_sizes)
    hidden = jnp.where(counted[..., None], hidden, 0)  # what is not counted may be NaN
    return Arguments(hidden, weight, jnp.where(counted, labels, -1).astype(jnp.int32), options), counted


def _check(hidden, weight, vocab_axis, temperature, soft_cap) -> None:
    if vocab_axis not in (0, 1, -1, -2):
        raise ValueError(f"vocab_axis={vocab_axis!r} must be 1 for a weight [D, V] or 0 for [V, D]")
    D = hidden.shape[-1]
    if weight.shape[1 - vocab_axis % 2] != D:
        raise ValueError(
            f"weight {weight.shape} with {vocab_axis=} has no axis of the hidden size {D}; its other axis must have it"
        )
    if 0 in (*hidden.shape, *weight.shape):
        raise ValueError(
            f"empty operands hidden {hidden.shape}, weight {weight.shape}: every dimension must be at least 1"
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature} must be positive; for the likeliest token use return_argmax"
        )
    if soft_cap < 0:
        raise ValueError(f"soft_cap={soft_cap} is negative; use 0 for none")
