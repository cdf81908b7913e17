"""The max-plus product slice by slice of the shared axis: no array larger than the operands and the result.

Letters: see the package; P all leading axes as one; g the cotangent of c. The winner j of the forward pass is all the
backward pass needs:  dA[m, j_mn] += g_mn,  dB[j_mn, n] += g_mn.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.tropical import tiles
from kernels.tropical.matmul.arguments import Arguments


def blockwise(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """c [..., M, N] and the first winner [..., M, N] int32 (-1 where c = -inf)."""
    a, b = arguments.a, arguments.b
    if b.ndim == 2:  # one matrix for all: leading axes are rows
        c, j = _product(a.shape[-1], a.reshape(1, -1, a.shape[-1]), b[None])
        return tuple(x.reshape(*a.shape[:-1], b.shape[-1]) for x in (c, j))
    lead = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (jnp.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, *x.shape[-2:]) for x in (a, b))
    return tuple(x.reshape(*lead, *x.shape[1:]) for x in _product(a.shape[-1], a, b))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(K, a, b):
    """a [P, M, K], b [P, K, N] -> c, j [P, M, N]."""
    return tiles.product(a.swapaxes(1, 2), b, tiles.nothing((*a.shape[:2], b.shape[2]), a.dtype))


def _forward(K, a, b):
    c, j = _product(K, a, b)
    return (c, j), j


def _backward(K, j, cotangents):
    P, M, N = j.shape
    p, m, n = jnp.ogrid[:P, :M, :N]
    g, at = jnp.where(j >= 0, cotangents[0], 0), jnp.maximum(j, 0)
    da = jnp.zeros((P, M, K), g.dtype).at[p, m, at].add(g)
    return da, jnp.zeros((P, K, N), g.dtype).at[p, at, n].add(g)


_product.defvjp(_forward, _backward)
