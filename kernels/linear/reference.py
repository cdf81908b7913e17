"""Linear attention written as its equations, dense in T x S: the definition the fast forms must meet.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size, E = Dv + 1 columns.
"""

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.linear import states
from kernels.linear.arguments import Arguments, State


def reference(arguments: Arguments) -> tuple[jax.Array, jax.Array, State]:
    """Numerator [B, T, H, Dv], denominator [B, T, H] and the state after the last key, in the accumulation dtype."""
    a, dtype = arguments, arguments.accumulator
    (B, T, H, D), (_, S, K, _) = a.q.shape, a.k.shape
    q, k, v = a.q.astype(dtype).reshape(B, T, K, H // K, D), a.k.astype(dtype), a.v.astype(dtype)
    behind = (a.mask.q_offset + jnp.arange(T))[:, None] - jnp.arange(S)
    if a.angle is None:
        w = _product("btkgd,bskd->bkgts", q, k)
    elif a.angle.shape[1] == 1:
        w = _product("btkgd,bskd->bkgts", q, k) * jnp.cos(a.angle[:, :, None] * behind)[:, None, None]
    else:
        w = _product("btkgd,bskd,btsd->bkgts", q, k, jnp.cos(a.angle[:, None, None] * behind[..., None]))
    seen = masks.dense(a.mask, T, S)
    seen = seen if a.allowed is None else seen & a.allowed
    w = jnp.where(seen[:, None, None], w, 0)
    n = _product("bkgts,bske->btkge", w, states.with_ones(v)).reshape(B, T, H, -1)
    n = n + states.read(a, a.state) if a.given_state else n
    if a.seen_rows is not None:
        n = jnp.where(a.seen_rows[:, :, None, None], n, 0)
    return n[..., :-1], n[..., -1], states.append(a)


def _product(equation, *operands):
    return jnp.einsum(equation, *operands, precision="highest")
