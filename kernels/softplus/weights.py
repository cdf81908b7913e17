"""The scalar functions of softplus attention and their derivatives, elementwise: no sums, no loops, no matrix products.

Letters: s score, a = phi(s) weight of stage 1, n keys of the row, Z sum of a, tau threshold, M largest excess a - tau,
r = max(a - tau, 0) / M in [0, 1], p power. "sharp" rows are re-weighted; the others are degenerate (M = 0).
"""

import jax
import jax.numpy as jnp

from kernels.softplus.arguments import Options

MASKED = -1e30  # score of an invisible pair; finite, so that differences of it are not NaN
LOWEST = -1e20  # running maximum before anything was seen: exp(MASKED - LOWEST) = 0


def phi(options: Options, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """phi(s) and its derivative. softplus(s) = max(s, 0) + log1p(exp(-|s|)), which never rounds to 0 early."""
    if options.phi == "exp":
        a = jnp.exp(s)
        return a, a
    if options.phi == "relu":
        a, rising = jnp.maximum(s, 0), (s > 0).astype(s.dtype)
        if options.phi_power == 1:
            return a, rising
        return real_power(a, options.phi_power), options.phi_power * real_power(a, options.phi_power - 1)
    e = jnp.exp(-jnp.abs(s))
    if options.phi == "sigmoid":
        return jnp.where(s >= 0, 1, e) / (1 + e), e / jnp.square(1 + e)
    tail = jnp.log1p(e)
    # The derivative sigmoid(s) = exp(s - softplus(s)) without the cancellation, and without a division.
    return jnp.maximum(s, 0) + tail, jnp.exp(jnp.minimum(s, 0) - tail)


def real_power(x: jax.Array, p: float | jax.Array) -> jax.Array:
    """x ** p for x >= 0, with 0 ** p = 0 (also for p = 0); by multiplications if p is a whole Python number."""
    if isinstance(p, (int, float)) and float(p).is_integer() and p >= 0:
        return jax.lax.integer_pow(x, int(p)) if p > 0 else (x > 0).astype(x.dtype)
    positive = x > 0
    # exp(p log x) with the logarithm kept away from 0, also in the gradient.
    return jnp.where(positive, jnp.exp(p * jnp.log(jnp.where(positive, x, 1))), 0)


def threshold(options: Options, t, Z, amax, shift):
    """(tau, M) of rows from t = Rows.threshold, the sum and the largest of a; M = 0 marks a degenerate row.

    A weight exp(s) is known relative to exp(shift); a threshold that is no multiple of Z has to be divided by it.
    """
    if options.normalise == "l1":
        tau = t * Z
    elif options.shifted:
        tau = jnp.where(t > 0, t * jnp.exp(-shift), 0)
    else:
        tau = t * jnp.ones_like(Z)
    M = amax - tau
    return tau, jnp.where(options.tolerance * amax < M, M, 0)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x, and 0 where x is not positive; in the gradient too."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
