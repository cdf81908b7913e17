"""Linear attention written as its equations, dense in T x S: the definition the fast forms must meet.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size, E = Dv + 1 columns
(Dv without a denominator).
"""

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.linear import decays, states
from kernels.linear.arguments import Arguments, State


def reference(arguments: Arguments) -> tuple[jax.Array, jax.Array | None, State]:
    """Numerator [B, T, H, Dv], denominator [B, T, H] and the state after the last key, in the accumulation dtype."""
    a, dtype = arguments, arguments.accumulator
    (B, T, H, D), (_, S, K, _) = a.q.shape, a.k.shape
    q, k, v = a.q.astype(dtype).reshape(B, T, K, H // K, D), a.k.astype(dtype), a.v.astype(dtype)
    rows, seen = decays.rows_of(a.mask.q_offset, T, S), masks.dense(a.mask, T, S)
    seen = seen if a.allowed is None else seen & a.allowed
    factors = _factors(a, rows)
    if factors.shape[4] == 1:
        w = _product("btkgd,bskd->bkgts", q, k) * factors[..., 0].transpose(0, 3, 1, 2)[:, :, None]
    else:
        w = _product("btkgd,bskd,btskd->bkgts", q, k, factors)
    w = jnp.where(seen[:, None, None], w, 0)
    v = states.with_ones(v) if a.denominator else v
    if a.value_decay is None:
        n = _product("bkgts,bske->btkge", w, v)
    else:
        n = _product("bkgts,bske,btske->btkge", w, v, decays.between(a.value_decay, rows))
    n = n.reshape(B, T, H, -1)
    n = n + states.read(a, a.state) if a.given_state else n
    if a.seen_rows is not None:
        n = jnp.where(a.seen_rows[:, :, None, None], n, 0)
    num, den = (n[..., :-1], n[..., -1]) if a.denominator else (n, None)
    return num, den, states.append(a)


def _factors(a, rows):
    """What multiplies q_td k_sd: [B or 1, T or 1, S or 1, K or 1, D or 1], of size 1 where nothing depends on it."""
    S, factors = a.k.shape[1], jnp.ones((1, 1, 1, 1, 1), a.accumulator)
    if a.angle is not None:
        behind = (a.mask.q_offset + jnp.arange(a.q.shape[1]))[:, None] - jnp.arange(S)
        factors = factors * jnp.cos(a.angle[:, None, None] * behind[..., None])[:, :, :, None]
    return factors if a.key_decay is None else factors * decays.between(a.key_decay, rows)


def _product(equation, *operands):
    return jnp.einsum(equation, *operands, precision="highest")
