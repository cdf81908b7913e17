"""The backward pass of max-plus linear attention from its winners: work T x Dv x D, whatever the distance to a winner.

Letters: see the package; g a cotangent, j the winner of a context (i, d) or the origin of a state entry (d', d):
a key, -1 the initial state, -2 nothing.
"""

import jax
import jax.numpy as jnp

from kernels.tropical import tiles
from kernels.tropical.linear.reference import INITIAL

TILE = 1 << 19  # numbers of one chunk


def gradients(q, k, v, m0, j, origin, dc, dstate):
    """dq, dk, dv, da, dm0 from cotangents dc [B, T, H, Dv] of the context and dstate [B, K, D, Dv] of the state."""
    g = jnp.where(j >= INITIAL, dc, 0)
    dstate = jnp.where(origin >= INITIAL, dstate, 0)
    dq, dk, dv, dm0 = _from_contexts(q, k, v, m0, j, g)
    return dq, *_with_state((dk, dv, dm0), j, g, origin, dstate)


def of_channels(q_shape, j, p, origin, dc, dstate):
    """The same when the winners' channels p [B, T, H, Dv] are known: sums alone, all at once."""
    (B, T, H, D), (K, Dv) = q_shape, origin.shape[1::2]
    g, dstate = jnp.where(j >= INITIAL, dc, 0), jnp.where(origin >= INITIAL, dstate, 0)
    b, i, h, d = jnp.ogrid[:B, :T, :H, :Dv]
    of_key, at, head = jnp.where(j >= 0, g, 0), jnp.maximum(j, 0), h * K // H
    dq = jnp.zeros(q_shape, g.dtype).at[b, i, h, p].add(g)
    dk = jnp.zeros((B, T, K, D), g.dtype).at[b, at, head, p].add(of_key)
    dv = jnp.zeros((B, T, K, Dv), g.dtype).at[b, at, head, d].add(of_key)
    dm0 = jnp.zeros((B, K, D, Dv), g.dtype).at[b, head, p, d].add(g - of_key)
    return dq, *_with_state((dk, dv, dm0), j, g, origin, dstate)


def _with_state(gradients, j, g, origin, dstate):
    """dk, dv, da, dm0 with what the last state's entries send to their origins."""
    dk, dv, dm0 = gradients
    b, h, d, n = jnp.ogrid[tuple(slice(size) for size in origin.shape)]
    of_key = jnp.where(origin >= 0, dstate, 0)
    at = jnp.maximum(origin, 0)
    dk, dv = dk.at[b, at, h, d].add(of_key), dv.at[b, at, h, n].add(of_key)
    dm0 = dm0 + jnp.where(origin == INITIAL, dstate, 0)
    return dk, dv, _decay_gradient(j, g, origin, dstate), dm0


def _from_contexts(q, k, v, m0, j, g):
    (B, T, H, D), (K, Dv) = q.shape, v.shape[2:]
    b, _, h = jnp.ogrid[:B, :T, :H]
    head = jnp.broadcast_to(b * K + h * K // H, (B, T, H))  # rows of the state as [B K, Dv, D]
    at = (b[..., None] * T + jnp.maximum(j, 0)) * K + (h * K // H)[..., None]  # rows of k as [B T K, D]
    count = max(1, min(B * T * H, TILE // (D * Dv)))
    chunks = [_chunks(x.reshape(B * T * H, -1), count) for x in (q, head, at, j, g)]
    keys, start = k.reshape(-1, D), m0.swapaxes(2, 3).reshape(-1, Dv, D)
    row, channel = jnp.arange(count)[:, None], jnp.arange(Dv)

    def chunk(carry, item):
        (dk, dv, dm0), (q, head, at, j, g) = carry, item
        initial = j == INITIAL
        partner = jnp.where(initial[..., None], start[head[:, 0]], keys[at])  # [count, Dv, D]
        of_q, of_partner = q.T[..., None], jnp.moveaxis(partner, 2, 0)
        d = tiles.first_largest(lambda n: of_q[n] + of_partner[n], D, g.shape, g.dtype)
        of_key = jnp.where(initial, 0, g)
        dk, dv = dk.at[at, d].add(of_key), dv.at[at, channel].add(of_key)
        return (dk, dv, dm0.at[head, channel, d].add(g - of_key)), jnp.zeros_like(q).at[row, d].add(g)

    zeros = jnp.zeros_like(keys), jnp.zeros((B * T * K, Dv), v.dtype), jnp.zeros_like(start)
    (dk, dv, dm0), dq = jax.lax.scan(chunk, zeros, tuple(chunks))
    dq = dq.reshape(-1, D)[: B * T * H].reshape(q.shape)
    return dq, dk.reshape(k.shape), dv.reshape(v.shape), dm0.reshape(B, K, Dv, D).swapaxes(2, 3)


def _decay_gradient(j, g, origin, dstate):
    """da [B, T, K]: every winner j of row i adds its cotangent to the decays of tokens j + 1 .. i.

    The sums are running sums of where such ranges begin and end. Rounding would leave dust behind the last end, so
    ranges are counted as well: where none covers a token the gradient is exactly zero.
    """
    (B, T), K = j.shape[:2], origin.shape[1]
    total, count = jnp.zeros((B, T + 1, K), g.dtype), jnp.zeros((B, T + 1, K), jnp.int32)
    contexts = (jnp.arange(T), j.reshape(B, T, K, -1), g.reshape(B, T, K, -1))
    states = (jnp.array([T - 1]), origin.reshape(B, 1, K, -1), dstate.reshape(B, 1, K, -1))
    for rows, j, g in (contexts, states):
        used = (j < rows[:, None, None]) & (g != 0)
        g, b, h = jnp.where(used, g, 0), jnp.arange(B)[:, None, None, None], jnp.arange(K)[:, None]
        begin = jnp.where(used, j + 1, 0)
        total = total.at[b, begin, h].add(g).at[:, rows + 1].add(-g.sum(-1))
        count = (
            count.at[b, begin, h]
            .add(used.astype(jnp.int32))
            .at[:, rows + 1]
            .add(-used.sum(-1, dtype=jnp.int32))
        )
    covered = jnp.cumsum(count, axis=1)[:, :T] > 0
    return jnp.where(covered, jnp.cumsum(total, axis=1)[:, :T], 0)


def _chunks(x, count):
    """[rows, ...] -> [chunks, count, ...], filled up with zeros."""
    return jnp.pad(x, ((0, -x.shape[0] % count), (0, 0))).reshape(-1, count, x.shape[1])
