"""Softplus attention written as the paper's equations, dense in T x S: the definition the fast forms must meet.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size; i row, j key.
Its gradient is automatic differentiation of these lines; only the factors that cancel in a row are held fixed.
"""

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.softplus.arguments import Arguments
from kernels.softplus.weights import LOWEST, phi, real_power, reciprocal, threshold


def reference(arguments: Arguments) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """o [B, T, H, Dv] in q's dtype and the row statistics (Z, tau, M, W), each [B, T, H]."""
    R, statistics = dense_weights(arguments)
    B, H, T, S = R.shape
    v = arguments.v.astype(arguments.accumulator)
    R = R.reshape(B, v.shape[2], H // v.shape[2], T, S)
    o = jnp.einsum("bkgts,bskd->btkgd", R, v, precision="highest").reshape(B, T, H, -1)
    return o.astype(arguments.q.dtype), tuple(x[..., 0].swapaxes(1, 2) for x in statistics)


def dense_weights(arguments: Arguments) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """R [B, H, T, S] and the row statistics (Z, tau, M, W), each [B, H, T, 1]."""
    options, rows = arguments.options, jax.tree.map(lambda x: x[:, None, :, None], arguments.rows)
    T, S = arguments.q.shape[1], arguments.k.shape[1]
    seen = masks.dense(arguments.mask, T, S)[:, None]
    # The inner select keeps what an invisible score might hold out of the gradient of phi.
    s = jnp.where(seen, scores(arguments), 0)
    shift = jnp.zeros((), s.dtype)
    if options.shifted:
        top = jnp.where(seen, s, LOWEST).max(-1, keepdims=True)
        shift = jax.lax.stop_gradient(jnp.where(seen.any(-1, keepdims=True), top, 0))
    a = jnp.where(seen, _phi(options, s - shift), 0)
    Z = a.sum(-1, keepdims=True)
    P = a * (reciprocal(Z) if options.normalise == "l1" else rows.share)
    if options.power is None:
        return P, (Z, *(jnp.zeros_like(Z) for _ in range(3)))
    tau, M = threshold(options, rows.threshold, Z, a.max(-1, keepdims=True), shift)
    r = jax.nn.relu(a - tau) * jax.lax.stop_gradient(reciprocal(M))  # a row factor cancels in R
    w = real_power(r, options.power if arguments.power is None else arguments.power[:, None, None])
    W = w.sum(-1, keepdims=True)
    R = w * reciprocal(W)
    if options.degenerate == "lssa":
        R = jnp.where(M > 0, R, P)
    return R, (Z, tau, M, W)


def scores(arguments: Arguments) -> jax.Array:
    """s_ij = c_i q_i.k_j + b_i - slope |a_i - j|, [B, H, T, S]."""
    (B, T, H, D), (S, K) = arguments.q.shape, arguments.k.shape[1:3]
    q, k = (x.astype(arguments.accumulator) for x in (arguments.q, arguments.k))
    dot = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, K, H // K, D), k, precision="highest")
    c = arguments.gain[:, None] * arguments.rows.factor[:, None]
    s = c[..., None] * dot.reshape(B, H, T, S) + arguments.rows.bias[:, None, :, None]
    if arguments.slopes is None:
        return s
    distance = jnp.abs(arguments.mask.q_offset + jnp.arange(T)[:, None] - jnp.arange(S))
    return s - arguments.slopes[:, None, None] * distance


def _phi(options, s):
    """phi written so that automatic differentiation gives the derivative, relu'(0) = 0 included."""
    if options.phi == "softplus":
        return jax.nn.softplus(s)
    if options.phi == "sigmoid":
        return jax.nn.sigmoid(s)
    if options.phi == "relu":
        return real_power(jax.nn.relu(s), options.phi_power)
    return phi(options, s)[0]
