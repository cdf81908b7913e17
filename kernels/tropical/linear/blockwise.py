"""Max-plus linear attention in chunks of tokens: linear time and memory, with its own backward pass.

Letters: see the package; C tokens of a chunk, rows = G C of its queries for one key/value head, M the state before the
chunk, A_ij the decay between keys j and i of the chunk, A_i the decay since before its first token.

    c_i  = max( max_d' (q_id' + A_i + M[d']),   max_j (max_d' (q_id' + k_jd') + A_ij + v_j) )        j in the chunk
    M'   = max( A_C + M,   max_j (k_j + A_Cj + v_j) )
The winner j of each (i, d) is all the backward pass needs: d' is found again from q_i and k_j.
"""

import jax
import jax.numpy as jnp

from kernels.tropical import tiles
from kernels.tropical.linear.arguments import Arguments
from kernels.tropical.linear.gradients import gradients
from kernels.tropical.linear.reference import INITIAL, NOTHING

CHUNK = 64


def blockwise(arguments: Arguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    """c and winners [B, T, H, Dv] (-1: initial state, -2: none), and the last state [B, K, D, Dv]."""
    a = arguments
    c, j, state, _ = _attend(a.q, a.k, a.v, a.a, a.m0, a.fresh)
    return c, j, state


@jax.custom_vjp
def _attend(q, k, v, a, m0, fresh):
    B, T, H, _ = q.shape
    size = min(T, CHUNK)
    q, v, a, fresh = (_chunks(x, size, 0) for x in (q, v, a, fresh))
    k, tops = _chunks(k, size, -jnp.inf), jnp.arange(0, T, size, dtype=jnp.int32)
    start = (m0, jnp.full(m0.shape, INITIAL, jnp.int32))
    (state, origin), (c, j) = jax.lax.scan(_chunk, start, (tops, q, k, v, a, fresh))
    c, j = (x.swapaxes(0, 1).reshape(B, -1, H, x.shape[-1])[:, :T] for x in (c, j))
    return c, j, state, origin


def _chunk(carry, tokens):
    """One chunk: state and the origins of its entries [B, K, D, Dv]; tokens [B, C, ...] from index `top`."""
    (state, origin), (top, q, k, v, a, fresh) = carry, tokens
    B, C, H, D = q.shape
    K = k.shape[2]
    q = q.reshape(B, C, K, H // K, D).transpose(0, 2, 4, 3, 1)  # [B, K, D, G, C]
    k, v, a = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), a.swapaxes(1, 2)  # [B, K, C, .]
    passed = jnp.cumsum(fresh, axis=1)[:, None]  # documents begun so far in the chunk, [B, 1, C]
    since = jnp.where(
        passed == 0, jnp.cumsum(a, axis=2), -jnp.inf
    )  # A_i, -inf where the state is of the past
    carried = (q + since[:, :, None, None]).reshape(B, K, D, -1)
    nothing = jnp.full((B, K, carried.shape[3], v.shape[3]), -jnp.inf, v.dtype)
    c, j = _from_state(carried, state, origin, (nothing, jnp.full(nothing.shape, NOTHING, jnp.int32)))
    between = _decay_between(a, passed)  # [B, K, key, row]
    s = _dot(q.reshape(B, K, D, -1), k).reshape(B, K, C, -1, C) + between[:, :, :, None]
    c, j = tiles.product(s.reshape(B, K, C, -1), v, (c, j), top)
    state = since[:, :, -1, None, None] + state
    state, origin = tiles.product(k + between[..., -1:], v, (state, origin), top)
    rows = (x.reshape(B, K, H // K, C, -1).transpose(0, 3, 1, 2, 4) for x in (c, j))
    return (state, origin), tuple(x.reshape(B, C, H, -1) for x in rows)


def _from_state(q, state, origin, carry):
    """Fold max_d' (q_d' + M[d']) into (c, j); of equals the one of the oldest key wins. q [B, K, D, rows]."""

    def step(d, carry):
        c, j = carry
        t, of = tiles.column(q, d) + tiles.row(state, d), tiles.row(origin, d)
        won = tiles.wins(t, c) | ((t == c) & (of < j))
        return jnp.where(won, t, c), jnp.where(won, of, j)

    return tiles.fold(q.shape[2], step, carry)


def _dot(q, k):
    """max_d (q_d + k_d), transposed: [B, K, C keys, rows] of q [B, K, D, rows] and k [B, K, C, D]."""
    k = k.swapaxes(2, 3)
    start = jnp.full((*k.shape[:2], k.shape[3], q.shape[3]), -jnp.inf, q.dtype)
    return tiles.fold(q.shape[2], lambda d, s: jnp.maximum(s, tiles.row(q, d) + tiles.column(k, d)), start)


def _decay_between(a, passed):
    """A_ij of rows i and keys j as [B, K, C keys, C rows], -inf where j is later or of another document.

    Summed from the row back to the key, so that near keys, which matter, get small and exact sums.
    """
    index = jnp.arange(a.shape[2])
    reached = jnp.where(index[:, None] <= index, a[..., None], 0)  # [B, K, l, i]
    sums = jnp.flip(jnp.cumsum(jnp.flip(reached, 2), axis=2), 2)
    sums = jnp.pad(sums[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
    seen = (index[:, None] <= index) & (passed[..., None] == passed[..., None, :])
    return jnp.where(seen, sums, -jnp.inf)


def _forward(q, k, v, a, m0, fresh):
    c, j, state, origin = _attend(q, k, v, a, m0, fresh)
    origin = jnp.where(state == -jnp.inf, NOTHING, origin)
    return (c, j, state, origin), (q, k, v, m0, j, origin)


def _backward(residuals, cotangents):
    dc, _, dstate, _ = cotangents
    return *gradients(*residuals, dc, dstate), None


_attend.defvjp(_forward, _backward)


def _chunks(x, size, fill):
    """[B, T, ...] -> [chunks, B, size, ...]; the end is filled up."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)
