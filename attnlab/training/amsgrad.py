"""Adam with AMSGrad as PyTorch computes it, which the prototype networks of arXiv 2310.18805 were trained with.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   u = max(u, v)
    direction = m / (1 - b1^t) / (sqrt(u) / sqrt(1 - b2^t) + eps)

The maximum is over raw second moments and is corrected for their start afterwards. `optax.amsgrad` takes it over
corrected ones, whose first is the largest by far: its steps are smaller.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class AmsgradState(NamedTuple):
    """t steps done [] int32; m, v and u (`mu`, `nu`, `nu_max`) shaped like the parameters."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    nu_max: optax.Updates


def torch_amsgrad(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Gradient -> direction of the update, to be multiplied by minus the learning rate; equations above."""

    def init(params):
        def zeros():
            return jax.tree.map(jnp.zeros_like, params)

        return AmsgradState(jnp.zeros((), jnp.int32), zeros(), zeros(), zeros())

    def update(gradients, state, params=None):
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, gradients)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu)

        def direction(m, u):
            t = count.astype(m.dtype)
            return m / (1 - b1**t) / (jnp.sqrt(u) / jnp.sqrt(1 - b2**t) + eps)

        return jax.tree.map(direction, mu, nu_max), AmsgradState(count, mu, nu, nu_max)

    return optax.GradientTransformation(init, update)
