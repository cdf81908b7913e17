"""Prefix softmax as its equation, dense in S x S: the definition the fast form must meet.

Letters: B batch, S positions, H logit heads, K value heads, Dv value size; i a row, j a key.
"""

import jax
import jax.numpy as jnp

from kernels.prefix_softmax.arguments import Arguments, exp_difference


def reference(arguments: Arguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    """o [B, S, H, Dv], m [B, S, H] and z [B, S, H] in the accumulation dtype; o = 0 where z = 0.

    m_i = max_j s_j,   z_i = sum_j e^(s_j - m_i),   o_i = sum_j e^(s_j - m_i) v_j / z_i       over the visible keys j
    """
    s, groups = arguments.s.swapaxes(1, 2), arguments.s.shape[2] // arguments.v.shape[2]
    v = jnp.repeat(arguments.v.astype(s.dtype), groups, axis=2)
    seen = visible(arguments)[:, None]
    s = jnp.where(seen, s[:, :, None, :], -jnp.inf)  # [B, H, S, S]
    m = jax.lax.stop_gradient(s.max(-1))
    if arguments.m is not None:
        m = jnp.maximum(m, jax.lax.stop_gradient(arguments.m)[..., None])
    w = exp_difference(s, m[..., None])
    z, n = w.sum(-1), jnp.einsum("bhij,bjhd->bhid", w, v, precision="highest")
    if arguments.m is not None:
        before = jax.lax.stop_gradient(exp_difference(arguments.m[..., None], m))
        z, n = z + before * arguments.z[..., None], n + before[..., None] * arguments.n[:, :, None]
    o = n / jnp.where(z > 0, z, 1)[..., None]
    return o.swapaxes(1, 2), m.swapaxes(1, 2), z.swapaxes(1, 2)


def visible(arguments: Arguments) -> jax.Array:
    """Rows i and keys j of one document with j <= i if causal, bool [B or 1, S, S]."""
    S, runs = arguments.s.shape[1], arguments.runs
    seen = jnp.tril(jnp.ones((1, S, S), bool)) if arguments.causal else jnp.ones((1, S, S), bool)
    return seen if runs is None else seen & (runs[:, :, None] == runs[:, None, :])
