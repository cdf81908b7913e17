"""Max-plus linear attention as its recurrence, one token at a time: the definition. Letters: see the package."""

import jax
import jax.numpy as jnp

from kernels.tropical.linear.arguments import Arguments

NOTHING = -2  # winner of a context of -inf
INITIAL = -1  # winner: the state before the first token


def reference(arguments: Arguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    """c and winners [B, T, H, Dv] (-1: initial state, -2: none), and the last state [B, K, D, Dv]."""
    (B, T, H, D), K = arguments.q.shape, arguments.k.shape[2]

    def step(carry, token):
        state, origin = carry
        t, q, k, v, a, fresh = token
        state = a[..., None, None] + jnp.where(fresh[:, None, None, None], -jnp.inf, state)
        new = k[..., :, None] + v[..., None, :]
        kept = state >= new  # the older wins ties
        state, origin = jnp.where(kept, state, new), jnp.where(kept, origin, t)
        return (state, origin), _read(q.reshape(B, K, H // K, D), state, origin)

    m0 = arguments.m0
    tokens = (arguments.q, arguments.k, arguments.v, arguments.a, arguments.fresh)
    tokens = (jnp.arange(T, dtype=jnp.int32), *(x.swapaxes(0, 1) for x in tokens))
    (state, _), (c, j) = jax.lax.scan(step, (m0, jnp.full(m0.shape, INITIAL, jnp.int32)), tokens)
    return tuple(x.swapaxes(0, 1).reshape(B, T, H, -1) for x in (c, j)) + (state,)


def _read(q, state, origin):
    """c and winner [B, K, G, Dv] of q [B, K, G, D]: largest sum over D; the oldest, then the first, of equals."""
    sums = q[..., None] + state[:, :, None]  # [B, K, G, D, Dv]
    origin = jnp.broadcast_to(origin[:, :, None], sums.shape)
    largest = sums.max(-2, keepdims=True)
    oldest = jnp.where(sums == largest, origin, jnp.iinfo(jnp.int32).max)
    at = jnp.argmin(oldest, axis=-2, keepdims=True)
    c = jnp.take_along_axis(sums, at, axis=-2)[..., 0, :]
    winner = jnp.take_along_axis(origin, at, axis=-2)[..., 0, :]
    return c, jnp.where(c == -jnp.inf, NOTHING, winner)
