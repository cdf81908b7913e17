"""Softplus attention for CUDA GPUs (Pallas-Triton), forward: a program a block of rows, one or two loops over the keys.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D and Dv head sizes; m a block of Bq
rows, n a block of Bk keys. Tiles are [Bq, Bk]; arrays stay as they came, [B, T, H, D], padded where they have to be:
T and S to whole blocks, head sizes to powers of two. The sweeps are those of `tpu.py`; scores are computed twice.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import pallas
from kernels.forgetting.arguments import BlockSizes
from kernels.softplus import fused, tiles
from kernels.softplus.arguments import Arguments
from kernels.softplus.fused import STATISTICS, Machine, pack
from kernels.softplus.gpu_backward import backward
from kernels.softplus.gpu_tiles import LEAST, dot, padded, rows_of, scores, shape_for, specs_of_rows, whole
from kernels.softplus.weights import reciprocal

LARGEST_HEAD = 256


def attend(arguments: Arguments) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """o [B, T, H, Dv] in q's dtype and the row statistics (Z, tau, M, W), each [B, T, H] float32."""
    return fused.attend(MACHINE, arguments, *_blocks(arguments), pallas.interpret())


def why_unsupported(arguments: Arguments) -> str | None:
    """A sentence, or None if the kernels can run on these arguments."""
    D, Dv, dtype = arguments.q.shape[-1], arguments.v.shape[-1], arguments.q.dtype
    if dtype == jnp.float64:
        return "GPU kernels sum in float32 and q is float64; cast q, k, v to float32 or use 'blockwise'"
    if max(D, Dv) > LARGEST_HEAD:
        return f"head sizes {D=}, {Dv=} pass {LARGEST_HEAD}, which registers allow; use 'blockwise'"
    sizes = arguments.block_sizes
    if sizes is None or pallas.interpret() is not False:
        return None
    if any(size < LEAST or size & (size - 1) for size in (sizes.q, sizes.k)):
        return (
            f"block_sizes q={sizes.q}, k={sizes.k} must be powers of two of at least {LEAST} on a GPU; "
            "leave them out for the kernel's own"
        )
    return None


def _blocks(arguments) -> tuple[BlockSizes, BlockSizes]:
    """Block sizes of the forward and of the backward pass."""
    if arguments.block_sizes is not None:
        return arguments.block_sizes, arguments.block_sizes
    shape = shape_for(arguments.q.shape[-1], arguments.v.shape[-1], arguments.q.dtype)
    return shape.forward, shape.backward


def forward(call, q, k, v, context, rows):
    """See `fused.Machine`."""
    (B, T, H), (Bq, Bk), Dv = q.shape[:3], (call.forward.q, call.forward.k), v.shape[-1]
    q, k, v = padded(q, Bq), padded(k, Bk), padded(v, Bk)
    (_, Tp, _, D), (_, Sp, K, Dp) = q.shape, v.shape
    names, floats = pack(rows, Tp)
    of_integers, integers = pack(context.integers, Tp, -1)
    ranges = context.forward_keys
    operands = [ranges, floats, integers, q, k, v]
    in_specs = [
        pl.BlockSpec((None, *ranges.shape[1:]), lambda m, h, b: (b, 0, 0)),
        *specs_of_rows(len(names), len(of_integers), Bq),
        pl.BlockSpec((None, Bq, None, D), lambda m, h, b: (b, m, h, 0)),
        whole(Sp, D, H // K),
        whole(Sp, Dp, H // K),
    ]
    if context.key_segments is not None:
        operands.append(fused.pad(context.key_segments, 1, Bk))
        in_specs.append(pl.BlockSpec((None, Sp), lambda m, h, b: (b, 0)))
    sweeps, pairs = 1 if call.options.power is None else 2, B * H * Tp * Sp // 2
    o, statistics = pl.pallas_call(
        partial(_kernel, call=call, names=(names, of_integers)),
        grid=(Tp // Bq, H, B),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((None, Bq, None, Dp), lambda m, h, b: (b, m, h, 0)),
            pl.BlockSpec((None, None, len(STATISTICS), Bq), lambda m, h, b: (b, h, 0, m)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, Tp, H, Dp), q.dtype),
            jax.ShapeDtypeStruct((B, H, len(STATISTICS), Tp), jnp.float32),
        ],
        compiler_params=shape_for(D, Dp, q.dtype).compiler_params,
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (D * sweeps + Dp),
            transcendentals=2 * pairs * sweeps,
            bytes_accessed=2 * q.nbytes + Tp // Bq * H // K * (k.nbytes + v.nbytes) // 2,
        ),
        interpret=call.interpret,
        name="softplus_forward",
    )(*operands)
    of_names = {name: statistics[:, :, n, :T] for n, name in enumerate(STATISTICS)}
    return o[:, :T, :, :Dv], of_names


def _kernel(ranges, floats, integers, q, k, v, *rest, call, names):
    options, Bk = call.options, call.forward.k
    segments, *rest = rest if "segment" in names[1] else (None, *rest)
    o, statistics = rest
    m = pl.program_id(0)
    first, end = ranges[m, 0], ranges[m, 1]
    rows, query, precise = rows_of(names, floats, integers), q[...], call.interpret is False
    (Bq, _), wide = query.shape, jnp.float32
    zero = jnp.zeros((Bq, 1), wide)
    acc = jnp.zeros((Bq, v.shape[-1]), wide)
    alone = options.power is None

    def sweep_1(n, carry):
        acc, Z, top = carry
        s, seen = scores(rows, query, k, segments, n * Bk, Bk, precise)
        a, Z, top, shrink = tiles.first_sums(options, s, seen, Z, top, 1)
        if alone:
            acc = acc if shrink is None else acc * shrink
            acc = acc + dot(a.astype(v.dtype), v[pl.ds(n * Bk, Bk), :], precise)
        return acc, Z, top

    # Without values to sum, the accumulator must not be carried through registers.
    top = zero + tiles.start(options)
    if alone:
        acc, Z, top = jax.lax.fori_loop(first, end, sweep_1, (acc, zero, top))
    else:
        Z, top = jax.lax.fori_loop(first, end, lambda n, carry: sweep_1(n, (None, *carry))[1:], (zero, top))
    f = stage_1 = reciprocal(Z) if options.normalise == "l1" else rows["share"]
    tau = M = W = zero
    shift = jnp.where(Z > 0, top, 0) if options.shifted else zero
    if not alone:
        tau, M, shift = tiles.between(options, rows, Z, top)
        per_M = reciprocal(M)

        def sweep_2(n, carry):
            acc, W = carry
            s, seen = scores(rows, query, k, segments, n * Bk, Bk, precise)
            a = jnp.where(seen, tiles.phi(options, s - shift)[0], 0)
            w = tiles.excess(options, rows, a, tau, per_M)
            used = jnp.where(M > 0, w, a) if options.degenerate == "lssa" else w
            acc = acc + dot(used.astype(v.dtype), v[pl.ds(n * Bk, Bk), :], precise)
            return acc, W + w.sum(1, keepdims=True)

        acc, W = jax.lax.fori_loop(first, end, sweep_2, (acc, zero))
        f = reciprocal(W)
        f = jnp.where(M > 0, f, stage_1) if options.degenerate == "lssa" else f
    o[...] = (acc * f).astype(o.dtype)
    for i, x in enumerate((Z, tau, M, W, shift)):
        statistics[i, :] = x[:, 0]


MACHINE = Machine(forward, backward)
