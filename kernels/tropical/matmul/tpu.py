"""The max-plus product as a TPU kernel: M x K x N work on the vector units, tiles of the result in registers.

Letters: see the package; P all leading axes as one, bm, bn, bk block sizes; g the cotangent of c, j the winners.

    per block, 16 rows m at a time:  c, j [16, bn] = first max over k of a[:, k] (a column) + b[k, :] (a row)
    backward, dense, no scatter:     dB[k, n] = sum_m where(j_mn = k, g_mn, 0),   dA^T the same of j^T and g^T
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas
from kernels.tropical import vectors
from kernels.tropical.matmul.arguments import Arguments, over_leading

ROWS, SHARED = 128, 128  # of a block, where the sizes reach that far
COLUMNS = {True: 512, False: 1024}  # with winners, twice as many registers are needed
LANES = 128


def why_unsupported(arguments: Arguments) -> str | None:
    """The kernel has float32 only."""
    return vectors.why_not_float32(arguments.a.dtype)


def pallas_tpu(arguments: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """c [..., M, N] float32 and, if asked for, the first winner [..., M, N] int32 (-1 where c = -inf)."""
    how = pallas.interpret()
    c, j = over_leading(partial(_product, arguments.winners, how), arguments)
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
    g = cotangents[0]
    da = _choose(how, j.swapaxes(1, 2), g.swapaxes(1, 2), K).swapaxes(1, 2)
    return da, _choose(how, j, g, K)


_product.defvjp(_forward, _backward)


def _block(size, most, unit):
    """The size filled up to whole units, or `most`."""
    return min(most, size + -size % unit)


def _sizes(how, M, N, K, winners):
    """Block sizes; few lanes in a simulation, so that it meets several blocks soon."""
    lanes, most = (8, 16) if how else (LANES, COLUMNS[winners])
    return (
        _block(M, most if how else ROWS, 8),
        _block(N, most, lanes),
        _block(K, lanes if how else SHARED, lanes),
    )


def _settings(how, flops, moved):
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        "cost_estimate": pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=4 * moved),
        "interpret": how,
    }


def _run(winners, how, a, b):
    (P, M, K), N = a.shape, b.shape[2]
    bm, bn, bk = _sizes(how, M, N, K, winners)
    a = vectors.pad(vectors.pad(a, 1, bm), 2, bk, -jnp.inf)
    b = vectors.pad(vectors.pad(b, 1, bk, -jnp.inf), 2, bn)
    grid = P, a.shape[1] // bm, b.shape[2] // bn, a.shape[2] // bk
    out = pl.BlockSpec((None, bm, bn), lambda p, m, n, k: (p, m, n))
    shape = P, a.shape[1], b.shape[2]
    found = pl.pallas_call(
        _kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((None, bm, bk), lambda p, m, n, k: (p, m, k)),
            pl.BlockSpec((None, bk, bn), lambda p, m, n, k: (p, k, n)),
        ],
        out_specs=[out] * (1 + winners),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.int32)[: 1 + winners]],
        name="maxplus_matmul_winners" if winners else "maxplus_matmul",
        **_settings(
            how, P * M * N * K * (4 if winners else 2), a.size * grid[2] + b.size * grid[1] + 2 * P * M * N
        ),
    )(a, b)
    c, j = (*found, None)[:2]
    return c[:, :M, :N], None if j is None else j[:, :M, :N]


def _kernel(a_ref, b_ref, c_ref, j_ref=None):
    """a [bm, bk], b [bk, bn], c and j [bm, bn], which stay in place for all k."""
    k = pl.program_id(3)

    @pl.when(k == 0)
    def _start():
        c_ref[...] = jnp.full(c_ref.shape, -jnp.inf, c_ref.dtype)
        if j_ref is not None:
            j_ref[...] = jnp.full(j_ref.shape, -1, j_ref.dtype)

    offset = k * a_ref.shape[1]
    vectors.in_groups(a_ref.shape[0], lambda m: vectors.first_max(a_ref, b_ref, c_ref, j_ref, m, offset))


def _choose(how, j, g, K):
    """sum_m where(j_mn = k, g_mn, 0), [P, K, N], of j and g [P, M, N]."""
    P, M, N = j.shape
    bk, bn, bm = _sizes(how, K, N, M, True)
    j = vectors.pad(vectors.pad(j, 1, bm, -1), 2, bn, -1)
    g = vectors.pad(vectors.pad(g, 1, bm), 2, bn)
    grid = P, K // bk + (K % bk > 0), j.shape[2] // bn, j.shape[1] // bm
    chosen = pl.BlockSpec((None, bm, bn), lambda p, k, n, m: (p, m, n))
    out = pl.pallas_call(
        _choose_kernel,
        grid=grid,
        in_specs=[chosen, chosen],
        out_specs=pl.BlockSpec((None, bk, bn), lambda p, k, n, m: (p, k, n)),
        out_shape=jax.ShapeDtypeStruct((P, grid[1] * bk, j.shape[2]), jnp.float32),
        name="maxplus_matmul_backward",
        **_settings(how, P * M * N * K * 3, 2 * j.size * grid[1] + P * N * K),
    )(j, g)
    return out[:, :K, :N]


def _choose_kernel(j_ref, g_ref, out_ref):
    """j, g [bm, bn], out [bk, bn], which stays in place for all m."""
    m, top = pl.program_id(3), pl.program_id(1) * out_ref.shape[0]

    @pl.when(m == 0)
    def _start():
        out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)

    def rows(r):
        k = top + r.start + jax.lax.broadcasted_iota(jnp.int32, (r.size, out_ref.shape[1]), 0)

        def eight(n, total):
            eight = pl.ds(pl.multiple_of(n * 8, 8), 8)
            j, g = j_ref[eight, :], g_ref[eight, :]
            for u in range(8):
                total += jnp.where(j[u : u + 1] == k, g[u : u + 1], 0)
            return total

        out_ref[r, :] = jax.lax.fori_loop(0, j_ref.shape[0] // 8, eight, out_ref[r, :])

    vectors.in_groups(out_ref.shape[0], rows)
