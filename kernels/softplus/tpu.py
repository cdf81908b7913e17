"""Softplus attention for TPU, forward: one call, of one sweep over the keys or (re-weighted) of two.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D and Dv head sizes; m a block of Bq
rows, n a block of Bk keys. Tiles are [Bk, Bq], keys along sublanes and queries along lanes: row vectors are then dense
in memory and broadcast for free, sums over keys need no lane crossing, and o and dq accumulate as [Dv, Bq], [D, Bq].

    sweep 1    Z = sum a, and the largest a; without re-weighting also sum a v
    between    tau = o Z / n, M = max a - tau
    sweep 2    W = sum r^p, sum r^p v, with r = max(a - tau, 0) / M. A row of blocks whose a fit in VMEM is kept there
               from sweep 1; otherwise scores are computed again. No value is fetched before sweep 2.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas
from kernels.forgetting.arguments import BlockSizes
from kernels.softplus import fused, tiles
from kernels.softplus.arguments import Arguments
from kernels.softplus.fused import STATISTICS, Machine, most_blocks, pack, pad
from kernels.softplus.tpu_backward import backward
from kernels.softplus.tpu_tiles import LANES, PACKED_SUBLANES, VMEM, chunks, dot, key_column, rows_of, scores
from kernels.softplus.weights import reciprocal

KEPT = 8 << 20  # bytes of a kept between the sweeps
LARGEST_HEAD = 1024


def attend(arguments: Arguments) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """o [B, T, H, Dv] in q's dtype and the row statistics (Z, tau, M, W), each [B, T, H] float32."""
    dtype, interpret = arguments.q.dtype, pallas.interpret()
    if dtype == jnp.float16:  # no such operands in the matrix unit
        arguments = fused.with_dtype(arguments, jnp.float32)
    o, statistics = fused.attend(MACHINE, arguments, *_blocks(arguments), interpret)
    return o.astype(dtype), statistics


def why_unsupported(arguments: Arguments) -> str | None:
    """A sentence, or None if the kernels can run on these arguments."""
    D, Dv, dtype = arguments.q.shape[-1], arguments.v.shape[-1], arguments.q.dtype
    if dtype == jnp.float64:
        return "TPU kernels sum in float32 and q is float64; cast q, k, v to float32 or use 'blockwise'"
    if max(D, Dv) > LARGEST_HEAD:
        return f"head sizes {D=}, {Dv=} pass {LARGEST_HEAD}, which tiles in VMEM allow; use 'blockwise'"
    sizes = arguments.block_sizes
    if sizes is not None and pallas.interpret() is False and (sizes.q % LANES or sizes.k % PACKED_SUBLANES):
        return (
            f"block_sizes q={sizes.q}, k={sizes.k} must be multiples of {LANES} and {PACKED_SUBLANES} on a TPU; "
            "leave them out for the kernel's own"
        )
    return None


def _blocks(arguments) -> tuple[BlockSizes, BlockSizes]:
    """Block sizes of the forward and of the backward pass."""
    if arguments.block_sizes is not None:
        return arguments.block_sizes, arguments.block_sizes
    (T, D), (S, Dv) = arguments.q.shape[1::2], arguments.v.shape[1::2]
    target = 512 if max(D, Dv) <= 128 else 256 if max(D, Dv) <= 512 else LANES
    keys = _even(S, target, LANES if S >= LANES else PACKED_SUBLANES)
    both, half = (BlockSizes(_even(T, size, LANES), keys) for size in (target, 256))
    # Half the rows at a time are worth it if their a then fits in VMEM.
    twice = arguments.options.power is not None and not _kept(arguments, both) and _kept(arguments, half)
    return half if twice else both, both


def _kept(arguments, sizes) -> bool:
    """Whether a of a block of rows is kept between the sweeps."""
    nk = math.ceil(arguments.k.shape[1] / sizes.k)
    return most_blocks(nk, sizes.k, sizes.q, arguments.mask.window) * sizes.k * sizes.q * 4 <= KEPT


def _even(length, target, multiple):
    """The block that covers `length` in as few equal blocks of at most `target` as possible."""
    return multiple * math.ceil(length / (multiple * math.ceil(length / target)))


def forward(call, q, k, v, context, rows):
    """See `fused.Machine`."""
    (B, T, H, D), (K, Dv), (Bq, Bk) = q.shape, v.shape[2:], (call.forward.q, call.forward.k)
    qt = pad(q.transpose(0, 2, 3, 1), 3, Bq)
    k, v = (pad(x.transpose(0, 2, 1, 3), 2, Bk) for x in (k, v))
    Tp, nq, nk = qt.shape[3], qt.shape[3] // Bq, k.shape[2] // Bk
    steps, sweeps = most_blocks(nk, Bk, Bq, call.window), 1 if call.options.power is None else 2
    kept = sweeps == 2 and steps * Bk * Bq * 4 <= KEPT
    names, floats = pack(rows, Tp)
    of_integers, integers = pack(context.integers, Tp, -1)

    def of_query(b, h, m, sweep, step, ranges):
        return b, h, 0, m

    def block(b, m, step, ranges):
        first, end = ranges[2 * (b * nq + m)], ranges[2 * (b * nq + m) + 1]
        return jnp.minimum(first + step, jnp.maximum(end - 1, first))

    def of_key(b, h, m, sweep, step, ranges):
        if kept:  # sweep 2 needs no keys: the block fetched last stays
            step = jnp.where(sweep == 1, steps, step)
        return b, jax.lax.div(h, H // K), block(b, m, step, ranges), 0

    def of_value(b, h, m, sweep, step, ranges):
        return b, jax.lax.div(h, H // K), block(b, m, step * (sweep == sweeps - 1), ranges), 0

    def of_segment(b, h, m, sweep, step, ranges):
        return b, of_key(b, h, m, sweep, step, ranges)[2], 0

    in_specs = [
        pl.BlockSpec((None, None, len(names), Bq), of_query),
        pl.BlockSpec((None, len(of_integers), Bq), lambda b, h, m, *_: (b, 0, m)),
        pl.BlockSpec((None, None, D, Bq), of_query),
        pl.BlockSpec((None, None, Bk, D), of_key),
        pl.BlockSpec((None, None, Bk, Dv), of_value),
    ]
    operands, segments = [floats, integers, qt, k, v], key_column(context.key_segments, Bk)
    if segments is not None:
        in_specs, operands = [*in_specs, pl.BlockSpec((None, Bk, 1), of_segment)], [*operands, segments]
    kernel = partial(_kernel, call=call, names=(names, of_integers), nq=nq, steps=steps, kept=kept)
    pairs, products = B * H * Tp * k.shape[2] // 2, 1 if kept else sweeps
    scratch = [VMEM((Dv, Bq), jnp.float32)] + kept * [VMEM((steps, Bk, Bq), jnp.float32)]
    o, statistics = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, H, nq, sweeps, steps),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((None, None, Dv, Bq), of_query),
                pl.BlockSpec((None, None, len(STATISTICS), Bq), of_query),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, Dv, Tp), q.dtype),
            jax.ShapeDtypeStruct((B, H, len(STATISTICS), Tp), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (D * products + Dv),
            transcendentals=2 * pairs * products,
            bytes_accessed=2 * qt.nbytes + nq * H // K * (k.nbytes + v.nbytes) // 2,
        ),
        interpret=call.interpret,
        name="softplus_forward",
    )(context.forward_keys.reshape(-1), *operands)
    of_names = {name: statistics[:, :, n, :T] for n, name in enumerate(STATISTICS)}
    return o.transpose(0, 3, 1, 2)[:, :T], of_names


def _kernel(ranges, floats, integers, q, k, v, *rest, call, names, nq, steps, kept):
    """One tile; `statistics` (in VMEM until the block of rows is done) holds the running maximum in its last row."""
    options, sweeps = call.options, 1 if call.options.power is None else 2
    segments, *rest = rest if "segment" in names[1] else (None, *rest)
    o, statistics, acc, *cache = rest
    b, m, sweep, step = (pl.program_id(n) for n in (0, 2, 3, 4))
    first, end = ranges[2 * (b * nq + m)], ranges[2 * (b * nq + m) + 1]
    n, needed = first + step, first + step < end
    rows = rows_of(names, floats, integers)
    Z, tau, M, W, top = (statistics.at[pl.ds(i, 1)] for i in range(5))

    @pl.when((sweep == 0) & (step == 0))
    def _():
        statistics[...] = jnp.zeros_like(statistics)
        top[...] = jnp.full(top.shape, tiles.start(options), jnp.float32)
        acc[...] = jnp.zeros_like(acc)

    @pl.when((sweep == 0) & needed)
    def _():
        for keys in chunks(k.shape[0]):
            s, seen = scores(rows, q, k, segments, n * k.shape[0], keys)
            a, Z[...], top[...], shrink = tiles.first_sums(options, s, seen, Z[...], top[...], 0)
            if kept:
                cache[0][step, keys] = jnp.where(seen, s, tiles.MASKED) if options.shifted else a
            if sweeps == 1:
                old = acc[...] if shrink is None else acc[...] * shrink
                acc[...] = old + dot(v[keys], a.astype(v.dtype), 0, 0)

    if sweeps == 2:

        @pl.when((sweep == 1) & (step == 0))
        def _():
            tau[...], M[...], top[...] = tiles.between(options, rows, Z[...], top[...])

        @pl.when((sweep == 1) & needed)
        def _():
            for keys in chunks(k.shape[0]):
                if kept:
                    a = cache[0][step, keys]
                    a = jnp.exp(a - top[...]) if options.shifted else a
                else:
                    s, seen = scores(rows, q, k, segments, n * k.shape[0], keys)
                    a = jnp.where(seen, tiles.phi(options, s - top[...])[0], 0)
                w = tiles.excess(options, rows, a, tau[...], reciprocal(M[...]))
                W[...] += w.sum(0, keepdims=True)
                used = jnp.where(M[...] > 0, w, a) if options.degenerate == "lssa" else w
                acc[...] += dot(v[keys], used.astype(v.dtype), 0, 0)

    @pl.when((sweep == sweeps - 1) & (step == steps - 1))
    def _():
        f = stage_1 = reciprocal(Z[...]) if options.normalise == "l1" else rows["share"]
        if sweeps == 2:
            f = reciprocal(W[...])
            f = jnp.where(M[...] > 0, f, stage_1) if options.degenerate == "lssa" else f
        else:
            top[...] = jnp.where(Z[...] > 0, top[...], 0) if options.shifted else jnp.zeros_like(f)
        o[...] = (acc[...] * f).astype(o.dtype)


MACHINE = Machine(forward, backward)
