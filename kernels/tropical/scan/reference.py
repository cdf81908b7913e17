"""The max-plus scan token by token: its definition. Letters: see the package."""

import jax
import jax.numpy as jnp

from kernels.tropical.scan.arguments import Arguments


def reference(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """h [B, T, ...] and whether the carried state won, bool [B, T, ...]."""

    def step(h, token):
        a, b = token
        carried = a + h
        won = carried >= b
        # A choice, not jnp.maximum, whose gradient would be split over ties.
        h = jnp.where(won, carried, b)
        return h, (h, won)

    tokens = arguments.a.swapaxes(0, 1), arguments.b.swapaxes(0, 1)
    _, (h, won) = jax.lax.scan(step, arguments.h0, tokens)
    return h.swapaxes(0, 1), won.swapaxes(0, 1)
