"""Causal linear attention with decays, in chunks whose pairs are taken apart by halving.

Letters: B batch, L positions, C positions of a chunk (a power of two), K key/value heads, G query heads each, D head
size, E columns of the values; X channels of a decay (1, or D of keys, or E of values); a a row, b an older or the same
key of a chunk, h the size of a half. With logarithms g and g' of the key's and the value's decays:

    A_ab = sum_d q_ad k_bd exp(sum of g_ld over b < l <= a)
    n_ae = sum_b A_ab v_be exp(sum of g'_le over b < l <= a) + what the state at the chunk's start gives

A pair a > b is met in one level of the halving: a in the second and b in the first half of 2h positions. The exponent
is then (sum up to a in its half) + (sum after b in its half): a factor of the row and one of the key, both <= 1, so
products are matrix products. Nothing is divided or subtracted: no decay is too strong, and the gradient of one is a
sum over the pairs that hold it. For gradients, each chunk is recomputed from the state at its start.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_product = partial(jnp.einsum, precision="highest")


def decayed(C, q, k, v, key_decay, value_decay, documents, state, current):
    """The sweep over chunks.

    C chunk size, dividing L; q [B, K, G, L, D]; k [B, K, L, D]; v [B, K, L, E]; key_decay [B, K, L, 1 or D] and
    value_decay [B, K, L, Dv] or None; documents int32 [B, L] or None, each document one run; state [B, K, D, E] of the
    document `current` [B]. Returns n [B, K, G, L, E] and the state after L positions, in the state's dtype.
    """
    none = jnp.zeros((*k.shape[:3], 1), state.dtype)
    key_decay, value_decay = (none if g is None else g for g in (key_decay, value_decay))
    operands = [_chunks(x, C) for x in (q, k, v, key_decay, value_decay)]
    if documents is not None:
        operands.append(documents.reshape(documents.shape[0], -1, C).swapaxes(0, 1))
    step = _chunk if operands[0].shape[0] == 1 else jax.checkpoint(_chunk, prevent_cse=False)
    (state, _), n = lax.scan(step, (state, current), operands)
    n = jnp.moveaxis(n, 0, -3)
    return n.reshape(*n.shape[:3], -1, n.shape[-1]), state


def _chunk(carry, operands):
    (Z, current), (q, k, v, g, h, *documents) = carry, operands
    q, k, v = (x.astype(Z.dtype) for x in (q, k, v))
    ids = documents[0] if documents else None
    last = None if ids is None else ids[:, -1]
    n = _weighted(_scores(q, k, g, ids), v, h)
    read = _product("bkgad,bkde->bkgae", _same(q * _up_to(g)[:, :, None], ids, current), Z)
    new = _product("bkcd,bkce->bkde", _same(k * _after(g), ids, last), v * _after(h))
    Z = Z * jnp.exp(g.sum(2))[..., None] * jnp.exp(h.sum(2))[:, :, None]
    Z = Z if ids is None else jnp.where((last == current)[:, None, None, None], Z, 0)
    return (Z + new, last), n + read * _up_to(h)[:, :, None]


def _scores(q, k, g, ids):
    """A: its diagonal [B, K, G, C], and a level for every half size h, [B, K, G, C / 2h, h, h]."""
    levels = []
    for h in _half_sizes(k.shape[2]):
        rows, keys = _halves(q, h)[1], _halves(k, h)[0]
        above, below = _factors(g, h)
        A = _product("bkgnad,bkncd->bkgnac", rows * above[:, :, None], keys * below)
        if ids is not None:
            first, second = _halves(ids[..., None], h)
            A = jnp.where((second == first.swapaxes(-1, -2))[:, None, None], A, 0)
        levels.append(A)
    return (q * k[:, :, None]).sum(-1), levels


def _weighted(scores, v, g):
    """sum_b A_ab v_be exp(...): [B, K, G, C, E]."""
    diagonal, levels = scores
    n = diagonal[..., None] * v[:, :, None]
    for h, A in zip(_half_sizes(v.shape[2]), levels, strict=True):
        above, below = _factors(g, h)
        second = _product("bkgnac,bknce->bkgnae", A, _halves(v, h)[0] * below) * above[:, :, None]
        n = n + jnp.stack([jnp.zeros_like(second), second], axis=-3).reshape(n.shape)
    return n


def _half_sizes(C):
    return [1 << level for level in range(C.bit_length() - 1)]


def _halves(x, h):
    """First and second halves of every 2h positions: two [..., C / 2h, h, X] from [..., C, X]."""
    x = x.reshape(*x.shape[:-2], -1, 2, h, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _factors(g, h):
    """exp of the sums up to each row of a second half, and of those after each key of a first half."""
    first, second = _halves(g, h)
    return _up_to(second), _after(first)


def _up_to(g):
    """exp of the sums along axis -2 up to and with each position."""
    return jnp.exp(lax.cumsum(g, axis=g.ndim - 2))


def _after(g):
    """exp of the sums along axis -2 of the positions after each."""
    later = jnp.concatenate([g[..., 1:, :], jnp.zeros_like(g[..., :1, :])], axis=-2)
    return jnp.exp(lax.cumsum(later, axis=g.ndim - 2, reverse=True))


def _same(x, ids, document):
    """x [B, K, (G,) C, D] with zeros at positions outside `document` [B]."""
    if ids is None:
        return x
    inside = (ids == document[:, None]).reshape(ids.shape[0], *(1,) * (x.ndim - 3), ids.shape[1], 1)
    return jnp.where(inside, x, 0)


def _chunks(x, C):
    """[..., L, D] -> [N, ..., C, D]."""
    return jnp.moveaxis(x.reshape(*x.shape[:-2], -1, C, x.shape[-1]), -3, 0)
