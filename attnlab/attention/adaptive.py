"""Adaptive temperature: softmax that sharpens rows of high entropy ("softmax is not enough", arXiv 2410.01104).

    p = softmax(z),  E = -sum_s p_s log(p_s + 1e-9),  beta = max(polynomial(E), 1) where E > 1/2, else 1
    weights = softmax(beta z)

Letters: S keys. The polynomial was fitted by the paper's authors; gradients flow through beta.
"""

import jax
import jax.numpy as jnp

from kernels.signatures import Array, Bool, Float, checked

POLYNOMIAL = (-0.037, 0.481, -2.3, 4.917, -1.791)  # highest power first (paper's appendix, code)
ENTROPY_FROM = 0.5  # nats; rows sharper than this stay as they are


def temperature_of_entropy(entropy: Array) -> Array:
    """beta >= 1 of a row's entropy in nats; any shape, dtype kept."""
    beta = jnp.polyval(jnp.asarray(POLYNOMIAL, entropy.dtype), entropy)
    return jnp.where(entropy > ENTROPY_FROM, jnp.maximum(beta, 1.0), 1.0)


@checked
def adaptive_temperature(
    logits: Float[Array, "*rows S"], mask: Bool[Array, "*#rows S"] | None = None
) -> Float[Array, "*rows"]:
    """beta of every row of logits [..., S], over the keys where mask is True (all by default); 1 for empty rows."""
    p = _softmax(logits, mask)
    return temperature_of_entropy(-jnp.sum(p * jnp.log(p + 1e-9), axis=-1))


@checked
def adaptive_softmax(
    logits: Float[Array, "*rows S"], mask: Bool[Array, "*#rows S"] | None = None
) -> Float[Array, "*rows S"]:
    """softmax(beta z) of every row [..., S] over the keys where mask is True; float32 (or float64) inside, dtype kept.

    Rows without a key give zeros.
    """
    wide = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
    beta = adaptive_temperature(wide, mask)
    return _softmax(beta[..., None] * wide, mask).astype(logits.dtype)


def _softmax(logits: Array, mask: Array | None) -> Array:
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    mask = jnp.broadcast_to(mask, logits.shape)
    some = mask.any(-1, keepdims=True)
    # Empty rows take a softmax of zeros first, so that no infinity enters the gradient.
    p = jax.nn.softmax(jnp.where(some, jnp.where(mask, logits, -jnp.inf), 0.0), axis=-1)
    return jnp.where(mask, p, 0.0)
