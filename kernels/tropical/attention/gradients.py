"""The backward pass of tropical attention from its winners. Letters: see the package; g the cotangent of c.

For a row i and channel d with winner j, and p, m the first argmax and argmin over channels of q_i - k_j:

    dv[j, d] += g;    hilbert       dq[i, m] += g;  dq[i, p] -= g;  dk[j, p] += g;  dk[j, m] -= g
                      hilbert_asym  dq[i, :] -= g;  dq[i, m] += D g;  dk the negative
                      maxplus_dot   dq[i, p] += g;  dk[j, p] += g,  with p the first argmax of q_i + k_j
The winner's key is looked up for each (i, d), in chunks of rows: work T x Dv x D, whatever S.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.tropical import tiles

TILE = 1 << 19  # numbers of one chunk


def of_operands(score: str, scale: float, q, k, v, j, g) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv from the winners j and their cotangents g [B, T, H, Dv]; g = 0 where there is no winner."""
    (B, T, H, D), (S, K, Dv) = q.shape, v.shape[1:]
    b, _, h = jnp.ogrid[:B, :T, :H]
    at = (b[..., None] * S + jnp.maximum(j, 0)) * K + (h * K // H)[..., None]  # rows of k as [B S K, D]
    count = max(1, min(B * T * H, TILE // (D * Dv)))
    chunks = tuple(_chunks(x.reshape(B * T * H, -1), count) for x in (q, at, g))
    keys, row, channel = k.reshape(-1, D), jnp.arange(count)[:, None], jnp.arange(Dv)

    def chunk(carry, item):
        (dk, dv), (q, at, g) = carry, item
        dq, of_score = jnp.zeros_like(q), scale * g
        for channels, factor, of_key in _channels(score, q, keys[at]):
            dq = dq.at[row, channels].add(factor * of_score)
            dk = dk.at[at, channels].add(of_key * factor * of_score)
        if score == "hilbert_asym":
            dq, dk = dq - of_score.sum(1, keepdims=True), dk.at[at].add(of_score[..., None])
        return (dk, dv.at[at, channel].add(g)), dq

    start = jnp.zeros((B * S * K, D), k.dtype), jnp.zeros((B * S * K, Dv), v.dtype)
    (dk, dv), dq = jax.lax.scan(chunk, start, chunks)
    return dq.reshape(-1, D)[: B * T * H].reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


def _channels(score, q, k):
    """Channels [rows, Dv] that share in the score of q [rows, D] with k [rows, Dv, D], each with its derivative by q
    and the sign that turns it into the derivative by k."""
    q, k, D = q.T[..., None], jnp.moveaxis(k, 2, 0), q.shape[1]
    largest = partial(tiles.first_largest, count=D, shape=k.shape[1:], dtype=k.dtype)
    if score == "maxplus_dot":
        return [(largest(lambda d: q[d] + k[d]), 1, 1)]
    smallest = largest(lambda d: k[d] - q[d])
    if score == "hilbert":
        return [(smallest, 1, -1), (largest(lambda d: q[d] - k[d]), -1, -1)]
    return [(smallest, D, -1)]  # hilbert_asym, whose sums over all channels are added apart


def of_channels(
    score: str, scale: float, q_shape, v_shape, channels, j, g
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same when the channels (p, m) int32 [B, T, H, Dv] are known: sums alone, all at once."""
    (B, T, H, D), (S, K, Dv) = q_shape, v_shape[1:]
    b, i, h, d = jnp.ogrid[:B, :T, :H, :Dv]
    (p, m), at, of_score = channels, (b, jnp.maximum(j, 0), h * K // H), scale * g
    dq, dk = jnp.zeros(q_shape, g.dtype), jnp.zeros((B, S, K, D), g.dtype)
    shares = {
        "hilbert": [(m, 1, -1), (p, -1, -1)],
        "hilbert_asym": [(m, D, -1)],
        "maxplus_dot": [(p, 1, 1)],
    }
    for channel, factor, of_key in shares[score]:
        dq = dq.at[b, i, h, channel].add(factor * of_score)
        dk = dk.at[*at, channel].add(of_key * factor * of_score)
    if score == "hilbert_asym":
        dq = dq - of_score.sum(3, keepdims=True)
        dk = dk + jnp.zeros((B, S, K), g.dtype).at[at].add(of_score)[..., None]
    return dq, dk, jnp.zeros(v_shape, g.dtype).at[*at, d].add(g)


def of_bias(bias, j, g) -> jax.Array:
    """Gradient of the bias [B or 1, H or 1, T or 1, S or 1]."""
    (B, T, H, _) = g.shape
    b, i, h, _ = jnp.ogrid[:B, :T, :H, :1]
    places = (b, h, i, jnp.maximum(j, 0))
    places = tuple(jnp.where(size == 1, 0, place) for size, place in zip(bias.shape, places, strict=True))
    return jnp.zeros_like(bias).at[places].add(g)


def of_slopes(q_offset, j, g) -> jax.Array:
    """Gradient of the slopes [H]: minus the distance to the winner, for every row and channel."""
    behind = (q_offset + jnp.arange(j.shape[1]))[:, None, None] - j
    return -(g * behind).sum((0, 1, 3))


def _chunks(x, count):
    """[rows, ...] -> [chunks, count, ...], filled up with zeros."""
    return jnp.pad(x, ((0, -x.shape[0] % count), *((0, 0),) * (x.ndim - 1))).reshape(-1, count, *x.shape[1:])
