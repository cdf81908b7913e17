"""The canonical form of a max-plus product. Letters: see the package."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """a [..., M, K] and b [..., K, N] in the working dtype; leading axes broadcast. winners: they are asked for."""

    a: jax.Array
    b: jax.Array
    winners: bool = dataclasses.field(metadata={"static": True})


def canonicalize(a: jax.Array, b: jax.Array, winners: bool) -> Arguments:
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
    return Arguments(a.astype(dtype), b.astype(dtype), winners)


def layout(arguments: Arguments) -> tuple[Arguments, str]:
    """Mesh letters of the operands and of the result: leading axis 0 is batch, 1 is heads, others are whole."""
    a, b = arguments.a.shape, arguments.b.shape
    lead = jnp.broadcast_shapes(a[:-2], b[:-2])
    letters = ("bh" + "." * len(lead))[: len(lead)]

    def of(shape):
        own = len(shape) - 2
        pairs = zip(letters[len(lead) - own :], shape[:own], lead[len(lead) - own :], strict=True)
        return "".join(letter if size == full else "." for letter, size, full in pairs) + ".."

    return Arguments(of(a), of(b), arguments.winners), letters + ".."


def over_leading(product, arguments: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """product(a [P, M, K], b [P, K, N]) -> (c, winners or None) [P, M, N], for any leading axes."""
    a, b = arguments.a, arguments.b
    if b.ndim == 2:  # one matrix for all: leading axes are rows
        found = product(a.reshape(1, -1, a.shape[-1]), b[None])
        return jax.tree.map(lambda x: x.reshape(*a.shape[:-1], b.shape[-1]), found)
    lead = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (jnp.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, *x.shape[-2:]) for x in (a, b))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), product(a, b))
