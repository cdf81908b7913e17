"""Softplus attention for TPU, backward: dq by one sweep over the keys, then dk and dv by one over the queries.

Letters as in `tpu.py`; dR_ij = <do_i, v_j>. The threshold of a re-weighted row moves with every visible key, so ds
needs G_i = sum_j du_ij first. The sweep for dq does without: it sums du phi' k and phi' k apart and joins them last.

    dq_i = c_i (sum_j du_ij phi'_ij k_j - t_i G_i sum_j phi'_ij k_j)
    dk_j = sum_i c_i ds_ij q_i, ds_ij = (du_ij - t_i G_i) phi'_ij          dv_j = sum_i R_ij do_i
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.softplus import tiles
from kernels.softplus.fused import most_blocks, pack, pad
from kernels.softplus.tpu_tiles import VMEM, chunks, dot, key_column, rows_of, scores

OF_ROWS = ("drift", "c", "power")  # what the sweep for dq leaves besides dq


def backward(call, q, k, v, do, context, rows):
    """See `fused.Machine`."""
    T, S, (Bq, Bk) = q.shape[1], k.shape[1], (call.backward.q, call.backward.k)
    qt, dot_ = (pad(x.transpose(0, 2, 3, 1), 3, Bq) for x in (q, do))
    k_, v_ = (pad(x.transpose(0, 2, 1, 3), 2, Bk) for x in (k, v))
    segments = key_column(context.key_segments, Bk)
    operands = (qt, k_, v_, dot_, *([] if segments is None else [segments]))
    integers = pack(context.integers, qt.shape[3], -1)
    dq, of_rows = _queries(call, context.keys, pack(rows, qt.shape[3]), integers, operands)
    of_rows = {name: of_rows[:, :, n, :T] for n, name in enumerate(OF_ROWS)}
    rows = {name: x for name, x in rows.items() if name != "threshold"}
    if call.options.mean_threshold:
        rows["drift"] = of_rows["drift"]
    dk, dv = _keys(call, context.queries, pack(rows, qt.shape[3]), integers, operands)
    drows = {name: of_rows[name] for name in ("c", "power") if name in rows}
    return dq.transpose(0, 3, 1, 2)[:, :T], *(x.transpose(0, 2, 1, 3)[:, :S] for x in (dk, dv)), drows


def _queries(call, ranges, floats, integers, operands):
    """dq [B, H, D, Tp] and the row vectors OF_ROWS [B, H, 3, Tp]."""
    (B, H, D, Tp), (_, K, Sp, Dv), sizes = operands[0].shape, operands[2].shape, call.backward
    Bq, Bk = sizes.q, sizes.k
    nq, steps = Tp // Bq, most_blocks(Sp // Bk, Bk, Bq, call.window)

    def of_query(b, h, m, step, ranges):
        return b, h, 0, m

    def block(b, m, step, ranges):
        first, end = ranges[2 * (b * nq + m)], ranges[2 * (b * nq + m) + 1]
        return jnp.minimum(first + step, jnp.maximum(end - 1, first))

    def of_key(b, h, m, step, ranges):
        return b, jax.lax.div(h, H // K), block(b, m, step, ranges), 0

    in_specs = [
        pl.BlockSpec((None, None, len(floats[0]), Bq), of_query),
        pl.BlockSpec((None, len(integers[0]), Bq), lambda b, h, m, *_: (b, 0, m)),
        pl.BlockSpec((None, None, D, Bq), of_query),
        pl.BlockSpec((None, None, Bk, D), of_key),
        pl.BlockSpec((None, None, Bk, Dv), of_key),
        pl.BlockSpec((None, None, Dv, Bq), of_query),
        pl.BlockSpec((None, Bk, 1), lambda b, h, m, step, ranges: (b, block(b, m, step, ranges), 0)),
    ][: 2 + len(operands)]
    sums = 2 if call.options.mean_threshold else 1
    pairs = B * H * Tp * Sp // 2
    return pl.pallas_call(
        partial(_queries_kernel, call=call, names=(floats[0], integers[0]), nq=nq, steps=steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, H, nq, steps),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((None, None, D, Bq), of_query),
                pl.BlockSpec((None, None, len(OF_ROWS), Bq), of_query),
            ],
            scratch_shapes=[VMEM((D, Bq), jnp.float32)] * sums,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, D, Tp), operands[0].dtype),
            jax.ShapeDtypeStruct((B, H, len(OF_ROWS), Tp), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(operands, pairs, (1 + sums) * D + Dv, nq * H // K),
        interpret=call.interpret,
        name="softplus_backward_queries",
    )(ranges.reshape(-1), floats[1], integers[1], *operands)


def _queries_kernel(ranges, floats, integers, q, k, v, do, *rest, call, names, nq, steps):
    segments, *rest = rest if "segment" in names[1] else (None, *rest)
    dq, of_rows, E, *F = rest
    b, m, step = (pl.program_id(n) for n in (0, 2, 3))
    first, end = ranges[2 * (b * nq + m)], ranges[2 * (b * nq + m) + 1]
    rows = rows_of(names, floats, integers)
    drift, dc, dpower = (of_rows.at[pl.ds(i, 1)] for i in range(3))

    @pl.when(step == 0)
    def _():
        for x in (of_rows, E, *F):
            x[...] = jnp.zeros_like(x)

    @pl.when(first + step < end)
    def _():
        for keys in chunks(k.shape[0]):
            s, seen = scores(rows, q, k, segments, (first + step) * k.shape[0], keys)
            dR = dot(v[keys], do[...], 1, 0)
            _, da, moving, slope, dp = tiles.gradients(call.options, rows, s, seen, dR)
            E[...] += dot(k[keys], (da * slope).astype(k.dtype), 0, 0)
            if F:
                F[0][...] += dot(k[keys], slope.astype(k.dtype), 0, 0)
                drift[...] += moving.sum(0, keepdims=True)
            if dp is not None:
                dpower[...] += dp.sum(0, keepdims=True)

    @pl.when(step == steps - 1)
    def _():
        total = E[...]
        if F:
            drift[...] *= rows["threshold"]
            total -= drift[...] * F[0][...]
        dc[...] = (total * q[...].astype(jnp.float32)).sum(0, keepdims=True)
        dq[...] = (total * rows["c"]).astype(dq.dtype)


def _keys(call, ranges, floats, integers, operands):
    """dk [B, K, Sp, D] and dv [B, K, Sp, Dv]; the query heads of a key/value head follow one another."""
    (B, H, D, Tp), (_, K, Sp, Dv), sizes = operands[0].shape, operands[2].shape, call.backward
    Bq, Bk = sizes.q, sizes.k
    G, nk, steps = H // K, Sp // Bk, most_blocks(Tp // Bq, Bq, Bk, call.window)

    def block(b, n, step, ranges):
        first, end = ranges[2 * (b * nk + n)], ranges[2 * (b * nk + n) + 1]
        return jnp.minimum(first + step, jnp.maximum(end - 1, first))

    def of_query(b, h, n, g, step, ranges):
        return b, h * G + g, 0, block(b, n, step, ranges)

    def of_key(b, h, n, g, step, ranges):
        return b, h, n, 0

    in_specs = [
        pl.BlockSpec((None, None, len(floats[0]), Bq), of_query),
        pl.BlockSpec((None, len(integers[0]), Bq), lambda b, h, n, g, step, r: (b, 0, block(b, n, step, r))),
        pl.BlockSpec((None, None, D, Bq), of_query),
        pl.BlockSpec((None, None, Bk, D), of_key),
        pl.BlockSpec((None, None, Bk, Dv), of_key),
        pl.BlockSpec((None, None, Dv, Bq), of_query),
        pl.BlockSpec((None, Bk, 1), lambda b, h, n, *_: (b, n, 0)),
    ][: 2 + len(operands)]
    pairs = B * H * Tp * Sp // 2
    return pl.pallas_call(
        partial(_keys_kernel, call=call, names=(floats[0], integers[0]), nk=nk, G=G, steps=steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, nk, G, steps),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec((None, None, Bk, size), of_key) for size in (D, Dv)],
            scratch_shapes=[VMEM((Bk, size), jnp.float32) for size in (D, Dv)],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[1:3]],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=_cost(operands, pairs, 2 * (D + Dv), 2 + nk * G // 2),
        interpret=call.interpret,
        name="softplus_backward_keys",
    )(ranges.reshape(-1), floats[1], integers[1], *operands)


def _keys_kernel(ranges, floats, integers, q, k, v, do, *rest, call, names, nk, G, steps):
    segments, *rest = rest if "segment" in names[1] else (None, *rest)
    dk, dv, sum_dk, sum_dv = rest
    b, n, g, step = (pl.program_id(i) for i in (0, 2, 3, 4))
    first, end = ranges[2 * (b * nk + n)], ranges[2 * (b * nk + n) + 1]
    rows = rows_of(names, floats, integers)

    @pl.when((g == 0) & (step == 0))
    def _():
        for x in (sum_dk, sum_dv):
            x[...] = jnp.zeros_like(x)

    @pl.when(first + step < end)
    def _():
        for keys in chunks(k.shape[0]):
            s, seen = scores(rows, q, k, segments, n * k.shape[0], keys)
            dR = dot(v[keys], do[...], 1, 0)
            R, da, _, slope, _ = tiles.gradients(call.options, rows, s, seen, dR)
            da = da - rows["drift"] if "drift" in rows else da
            sum_dv[keys] += dot(R.astype(do.dtype), do[...], 1, 1)
            sum_dk[keys] += dot((da * slope * rows["c"]).astype(q.dtype), q[...], 1, 1)

    @pl.when((g == G - 1) & (step == steps - 1))
    def _():
        dk[...] = sum_dk[...].astype(dk.dtype)
        dv[...] = sum_dv[...].astype(dv.dtype)


def _cost(operands, pairs, depth, reads):
    """`depth` is the sum of the depths of a tile's products, `reads` how often the keys are read."""
    q, k, v, do = operands[:4]
    return pl.CostEstimate(
        flops=2 * pairs * depth,
        transcendentals=2 * pairs,
        bytes_accessed=2 * (q.nbytes + do.nbytes) + reads * (k.nbytes + v.nbytes) // 2,
    )
