"""The max-plus scan as an associative scan, whole or in chunks with the state carried from one to the next.

Letters: see the package; w_t whether the carried state won token t, g the cotangent of h.

    forward    (a, b) then (a', b') = (a + a', max(a' + b, b'))          no sum is ever subtracted, a may be -inf
    backward   e_t = g_t + w_{t+1} e_{t+1};   da_t = w_t e_t,  db_t = (1 - w_t) e_t,  dh_0 = w_1 e_1
The backward pass is the same kind of scan run backwards, and needs one bit a token and channel.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.tropical.scan.arguments import Arguments

CHUNK = 128


def blockwise(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """h [B, T, ...] and whether the carried state won, bool [B, T, ...]; chunks of 128 tokens."""
    return _scan(CHUNK, arguments.a, arguments.b, arguments.h0)


def associative(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """The same in one associative scan over all tokens: more memory, fewest sequential steps."""
    return _scan(arguments.a.shape[1], arguments.a, arguments.b, arguments.h0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(size, a, b, h0):
    T = a.shape[1]

    def join(first, second):
        return first[0] + second[0], jnp.maximum(second[0] + first[1], second[1])

    def chunk(h, tokens):
        total, own = jax.lax.associative_scan(join, tokens, axis=0)
        h = jnp.maximum(total + h, own)
        return h[-1], h

    _, h = jax.lax.scan(chunk, h0, (_chunks(a, size, 0), _chunks(b, size, -jnp.inf)))
    h = _whole(h, T)
    return h, a + jnp.concatenate([h0[:, None], h[:, :-1]], axis=1) >= b


def _forward(size, a, b, h0):
    h, won = _scan(size, a, b, h0)
    return (h, won), won


def _backward(size, won, cotangents):
    g = cotangents[0]
    onward = jnp.concatenate([won[:, 1:], jnp.zeros_like(won[:, :1])], axis=1)

    def join(later, earlier):
        return later[0] & earlier[0], earlier[1] + jnp.where(earlier[0], later[1], 0)

    def chunk(e, tokens):
        through, own = jax.lax.associative_scan(join, tokens, axis=0, reverse=True)
        e = own + jnp.where(through, e, 0)
        return e[0], e

    tokens = _chunks(onward, size, False), _chunks(g, size, 0)
    _, e = jax.lax.scan(chunk, jnp.zeros_like(g[:, 0]), tokens, reverse=True)
    e = _whole(e, g.shape[1])
    da = jnp.where(won, e, 0)
    return da, jnp.where(won, 0, e), da[:, 0]


_scan.defvjp(_forward, _backward)


def _chunks(x, size, fill):
    """[B, T, ...] -> [chunks, size, B, ...]; the end is filled up."""
    size = min(size, x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    return x.swapaxes(0, 1).reshape(-1, size, x.shape[0], *x.shape[2:])


def _whole(x, T):
    """The inverse of `_chunks`."""
    return x.reshape(-1, *x.shape[2:])[:T].swapaxes(0, 1)
