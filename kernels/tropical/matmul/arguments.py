"""The canonical form of a max-plus product. Letters: see the package."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """a [..., M, K] and b [..., K, N] in the working dtype; leading axes broadcast."""

    a: jax.Array
    b: jax.Array


def canonicalize(a: jax.Array, b: jax.Array) -> Arguments:
    """Checks a call and casts it to float32 (float64 if an operand is); see the public docstring for errors."""
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a {a.shape} and b {b.shape} share no axis: expected a [..., M, K], b [..., K, N]")
    if 0 in a.shape or 0 in b.shape:
        raise ValueError(f"empty operands a {a.shape}, b {b.shape}: every dimension must be at least 1")
    try:
        jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(
            f"leading axes of a {a.shape} and b {b.shape} do not broadcast; make them equal or 1"
        ) from None
    dtype = jnp.promote_types(jnp.float32, jnp.promote_types(a.dtype, b.dtype))
    return Arguments(a.astype(dtype), b.astype(dtype))


def layout(arguments: Arguments) -> tuple[Arguments, str]:
    """Mesh letters of the operands and of the result: leading axis 0 is batch, 1 is heads, others are whole."""
    a, b = arguments.a.shape, arguments.b.shape
    lead = jnp.broadcast_shapes(a[:-2], b[:-2])
    letters = ("bh" + "." * len(lead))[: len(lead)]

    def of(shape):
        own = len(shape) - 2
        pairs = zip(letters[len(lead) - own :], shape[:own], lead[len(lead) - own :], strict=True)
        return "".join(letter if size == full else "." for letter, size, full in pairs) + ".."

    return Arguments(of(a), of(b)), letters + ".."
