"""The max-plus product as a GPU kernel (Pallas-Triton): a tile of the result a program, one slice k at a time.

Letters: see the package; P all leading axes as one, bm, bn the tile. Only a strictly larger sum wins, so the lowest k
does; gradients are added at the winners' places, as in `blockwise`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import pallas
from kernels.tropical import tiles, vectors
from kernels.tropical.matmul.arguments import Arguments, over_leading
from kernels.tropical.matmul.blockwise import of_operands

BLOCK = 64


def why_unsupported(arguments: Arguments) -> str | None:
    """The kernel has float32 only."""
    return vectors.why_not_float32(arguments.a.dtype)


def pallas_gpu(arguments: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """c [..., M, N] float32 and, if asked for, the first winner [..., M, N] int32 (-1 where c = -inf)."""
    c, j = over_leading(partial(_product, arguments.winners, pallas.interpret()), arguments)
    return c, j if arguments.winners else None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(winners, how, a, b):
    """a [P, M, K], b [P, K, N] -> c [P, M, N] and j or None: two operations a sum without winners, else four."""
    return _run(winners, how, a, b)


def _forward(winners, how, a, b):
    c, j = _run(True, how, a, b)
    return (c, j if winners else None), (j, a.shape[2])


def _backward(winners, how, residuals, cotangents):
    j, K = residuals
    return of_operands(K, j, cotangents[0])


_product.defvjp(_forward, _backward)


def _run(winners, how, a, b):
    (P, M, K), N = a.shape, b.shape[2]
    bm, bn = (max(16, min(BLOCK, pl.next_power_of_2(size))) for size in (M, N))
    a, b = vectors.pad(a.swapaxes(1, 2), 2, bm), vectors.pad(b, 2, bn)
    out = pl.BlockSpec((None, bm, bn), lambda m, n, p: (p, m, n))
    shape = P, a.shape[2], b.shape[2]
    found = pl.pallas_call(
        _kernel,
        grid=(shape[1] // bm, shape[2] // bn, P),
        in_specs=[
            pl.BlockSpec((None, K, bm), lambda m, n, p: (p, 0, m)),
            pl.BlockSpec((None, K, bn), lambda m, n, p: (p, 0, n)),
        ],
        out_specs=[out] * (1 + winners),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.int32)[: 1 + winners]],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=P * M * N * K * (4 if winners else 2),
            transcendentals=0,
            bytes_accessed=4 * (a.size + b.size + (1 + winners) * P * M * N),
        ),
        interpret=how,
        name="maxplus_matmul_winners" if winners else "maxplus_matmul",
    )(a, b)
    c, j = (*found, None)[:2]
    return c[:, :M, :N], None if j is None else j[:, :M, :N]


def _kernel(a_ref, b_ref, c_ref, j_ref=None):
    """a [K, bm], b [K, bn] -> c, j [bm, bn]."""

    def slice_(k, carry):
        t = a_ref[k, :][:, None] + b_ref[k, :][None, :]
        c = jnp.maximum(carry[0], t)
        return (c, jnp.where(t > carry[0], k, carry[1])) if j_ref is not None else (c,)

    start = tiles.nothing(c_ref.shape, jnp.float32)
    found = tiles.fold(a_ref.shape[0], slice_, start if j_ref is not None else start[:1])
    c_ref[...] = found[0]
    if j_ref is not None:
        j_ref[...] = found[1]
