"""Tropical attention as its equations, dense in T x S x D: the definition. Letters: see the package."""

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.tropical.attention.arguments import Arguments


def reference(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """Context c [B, T, H, Dv], -inf where no key is visible, and its winners int32 (-1 there; all -1 when smooth)."""
    v = jnp.repeat(arguments.v, arguments.group, axis=2)
    t = scores(arguments)[..., None] + v.swapaxes(1, 2)[:, :, None]  # [B, H, T, S, Dv]
    if arguments.beta is not None:
        c = smooth_max(t, arguments.beta, axis=3).swapaxes(1, 2)
        return c, jnp.full(c.shape, -1, jnp.int32)
    # Winners are chosen by index: the gradient of jnp.max would be split over ties.
    winner = jnp.argmax(t, axis=3, keepdims=True)
    c = jnp.take_along_axis(t, winner, axis=3)[:, :, :, 0].swapaxes(1, 2)
    winner = winner[:, :, :, 0].swapaxes(1, 2).astype(jnp.int32)
    return c, jnp.where(c == -jnp.inf, -1, winner)


def scores(arguments: Arguments) -> jax.Array:
    """S [B, H, T, S]: raw scores times score_scale, slope and bias added, -inf where a key is invisible."""
    (_, T, _, _), S = arguments.q.shape, arguments.k.shape[1]
    k = jnp.repeat(arguments.k, arguments.group, axis=2)
    q, k = arguments.q.swapaxes(1, 2)[:, :, :, None], k.swapaxes(1, 2)[:, :, None]
    s = arguments.score_scale * raw_scores(q, k, arguments.score, arguments.beta)
    if arguments.slopes is not None:
        behind = (arguments.mask.q_offset + jnp.arange(T))[:, None] - jnp.arange(S)
        s = s - arguments.slopes[:, None, None] * behind
    if arguments.bias is not None:
        s = s + arguments.bias
    return jnp.where(masks.dense(arguments.mask, T, S)[:, None], s, -jnp.inf)


def raw_scores(q: jax.Array, k: jax.Array, score: str, beta: jax.Array | None) -> jax.Array:
    """The score of broadcasting q and k [..., D] -> [...]; beta None: hard maxima, the first index winning ties."""
    largest = first_max if beta is None else lambda x: smooth_max(x, beta, axis=-1)
    if score == "maxplus_dot":
        return largest(q + k)
    smallest = -largest(k - q)
    if score == "hilbert":
        return smallest - largest(q - k)
    return q.shape[-1] * smallest - (q.sum(-1) - k.sum(-1))  # hilbert_asym


def first_max(x: jax.Array) -> jax.Array:
    """Maximum over the last axis whose gradient goes to the first winner."""
    return jnp.take_along_axis(x, jnp.argmax(x, axis=-1, keepdims=True), axis=-1)[..., 0]


def smooth_max(x: jax.Array, beta: jax.Array, axis: int) -> jax.Array:
    """(1 / beta) log sum exp(beta x), -inf (and no gradient) where all x are -inf."""
    some = (x > -jnp.inf).any(axis, keepdims=True)
    total = jax.nn.logsumexp(beta * jnp.where(some, x, 0), axis=axis) / beta
    return jnp.where(some.squeeze(axis), total, -jnp.inf)
