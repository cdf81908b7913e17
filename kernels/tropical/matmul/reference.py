"""The max-plus product as it is defined, dense in M x K x N. Letters: see the package."""

import jax
import jax.numpy as jnp

from kernels.tropical.matmul.arguments import Arguments


def reference(arguments: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """c [..., M, N] and, if asked for, the first winner [..., M, N] int32 (-1 where c = -inf)."""
    sums = arguments.a[..., :, :, None] + arguments.b[..., None, :, :]
    # Choosing by index, not by jnp.max, whose gradient would be split evenly over ties.
    first = jnp.argmax(sums, axis=-2, keepdims=True)
    c = jnp.take_along_axis(sums, first, axis=-2)[..., 0, :]
    if not arguments.winners:
        return c, None
    return c, jnp.where(c == -jnp.inf, -1, first[..., 0, :].astype(jnp.int32))
