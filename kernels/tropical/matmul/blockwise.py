"""The max-plus product slice by slice of the shared axis: no array larger than the operands and the result.

Letters: see the package; P all leading axes as one; g the cotangent of c. The winner j of the forward pass is all the
backward pass needs:  dA[m, j_mn] += g_mn,  dB[j_mn, n] += g_mn.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.tropical import tiles
from kernels.tropical.matmul.arguments import Arguments, over_leading


def blockwise(arguments: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """c [..., M, N] and, if asked for, the first winner [..., M, N] int32 (-1 where c = -inf)."""
    c, j = over_leading(partial(_product, arguments.a.shape[-1]), arguments)
    return c, j if arguments.winners else None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(K, a, b):
    """a [P, M, K], b [P, K, N] -> c, j [P, M, N]."""
    return tiles.product(a.swapaxes(1, 2), b, tiles.nothing((*a.shape[:2], b.shape[2]), a.dtype))


def _forward(K, a, b):
    c, j = _product(K, a, b)
    return (c, j), j


def _backward(K, j, cotangents):
    return of_operands(K, j, cotangents[0])


def of_operands(K: int, j: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dA [P, M, K] and dB [P, K, N] from the winners j and the cotangent g [P, M, N]."""
    P, M, N = j.shape
    p, m, n = jnp.ogrid[:P, :M, :N]
    g, at = jnp.where(j >= 0, g, 0), jnp.maximum(j, 0)
    da = jnp.zeros((P, M, K), g.dtype).at[p, m, at].add(g)
    return da, jnp.zeros((P, K, N), g.dtype).at[p, at, n].add(g)


_product.defvjp(_forward, _backward)
