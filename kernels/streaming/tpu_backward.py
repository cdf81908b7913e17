"""Streaming attention on TPU, backward: one kernel for dq (a program a query block), one for dk and dv (a key block).

    P_ij = exp(s_ij - lse_i)      dS_ij = P_ij (do_i.v_j - delta_i)      delta_i = sum of o_i do_i - dlse_i
    dv_j = sum_i P_ij do_i        dq_i = sum_j dx_ij k_j                 dk_j = sum_i dx_ij q_i

dx and the gradients of the values of rows, keys and heads are the VJP of the score at dS, which is taken here, tile by
tile; a score that is linear in x has dx = scale dS, applied once at the end. The second kernel works on transposed
tiles, so that every product is a plain one and the rows' lse and delta are row vectors. Letters as in `tpu_plan.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import tiles
from kernels.streaming import tpu_plan, tpu_tile
from kernels.streaming.tpu_plan import Plan, Visits
from kernels.tiles import LANES, LOG2E


def backward_q(plan: Plan, q, k, v, rows, cols, extras, stats, do, visits: Visits):
    """dq as q, drows as rows and dextras [B, H, nq, E, 128] (every lane the same); None for what there is not.

    stats [B, H, nq, 2, Bq] holds lse in units of log 2 (+1e30 in rows that see nothing) and delta. Of a decay, the
    gradient of c_i is known without a kernel (the sum of dS over a row is dlse): drows is None.
    """
    (B, H, nq, Bq, D), (K, nk, Bk, Dv) = q.shape, v.shape[1:]
    fetched = plan.keys_a_fetch

    def of_query(b, h, m, j, *_):
        return b, h, m, 0, 0

    def place_of_keys(b, h, m, j, offset, limits, visit, clear):
        return tpu_plan.clamp(j, visit[plan.place(b, h, H, m, nq)], fetched)

    def of_key(b, h, m, j, *scalars):
        return b, jax.lax.div(h, H // K), place_of_keys(b, h, m, j, *scalars), 0, 0

    def of_head_key(b, h, m, j, *scalars):
        return b, h, place_of_keys(b, h, m, j, *scalars), 0, 0

    specs = [
        (q, pl.BlockSpec((1, 1, 1, Bq, D), of_query)),
        (k, pl.BlockSpec((1, 1, fetched, Bk, D), of_key)),
        (v, pl.BlockSpec((1, 1, fetched, Bk, Dv), of_key)),
        (stats, pl.BlockSpec((1, 1, 1, 2, Bq), of_query)),
        (do, pl.BlockSpec((1, 1, 1, Bq, Dv), of_query)),
        (rows, rows is not None and pl.BlockSpec((1, 1, 1, rows.shape[3], Bq), of_query)),
        (cols, cols is not None and pl.BlockSpec((1, 1, fetched, cols.shape[3], Bk), of_head_key)),
        (extras, extras is not None and pl.BlockSpec((1, *extras.shape[1:]), lambda b, h, *_: (h, 0, 0))),
        (visits.q_segments, pl.BlockSpec((1, 1, 1, Bq), lambda b, h, m, j, *_: (b, m, 0, 0))),
        (
            visits.kv_segments,
            pl.BlockSpec((1, fetched, 1, Bk), lambda b, h, *g: (b, place_of_keys(b, h, *g), 0, 0)),
        ),
    ]
    results = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    out_specs = [pl.BlockSpec((1, 1, 1, Bq, D), of_query)]
    sums = [(Bq, D)]
    if rows is not None and not plan.decays:
        results.append(jax.ShapeDtypeStruct(rows.shape, jnp.float32))
        out_specs.append(pl.BlockSpec((1, 1, 1, *rows.shape[3:]), of_query))
        sums += [(Bq, LANES)] * rows.shape[3]
    if extras is not None:
        results.append(jax.ShapeDtypeStruct((B, H, nq, *extras.shape[1:]), jnp.float32))
        out_specs.append(pl.BlockSpec((1, 1, 1, *extras.shape[1:]), of_query))
        sums += [extras.shape[1:]]
    dtypes = [jnp.float32] * 2 + tpu_tile.column_dtypes(plan, 0 if rows is None else rows.shape[3])
    operands = [x for x, _ in specs if x is not None]
    results_of = pl.pallas_call(
        partial(_kernel_q, plan, H, tuple(x is not None for x, _ in specs), len(results)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, H, nq, nk // fetched),
            in_specs=[spec for x, spec in specs if x is not None],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((Bq, Bk), dtype) for dtype in (jnp.float32, q.dtype)]
            + [pltpu.VMEM(shape, jnp.float32) for shape in sums]
            + [pltpu.VMEM((Bq, LANES), dtype) for dtype in dtypes],
        ),
        out_shape=results,
        compiler_params=tpu_plan.compiler_params("parallel", "parallel", "parallel", "arbitrary"),
        cost_estimate=tpu_plan.cost(plan, B * H, operands, results, of_q=2, of_v=1, D=D, Dv=Dv),
        interpret=plan.interpret,
        name=tpu_plan.name(plan, "backward_q"),
    )(visits.offset, visits.limits, visits.keys, visits.clear_keys, *operands)
    dq, *others = results_of
    drows = others.pop(0) if rows is not None and not plan.decays else None
    return dq, drows, others[0] if extras is not None else None


def _kernel_q(plan, H, present, outputs, offset, limits, visit, clear, *refs):
    refs = iter(refs)
    operands = [next(refs) if here else None for here in present]
    q, k, v, stats, do, rows, cols, extras, q_segments, kv_segments = operands
    out, P, dX, refs = [next(refs) for _ in range(outputs)], next(refs), next(refs), list(refs)
    still = tpu_tile.column_dtypes(plan, 0 if rows is None else rows.shape[3])
    split = len(refs) - len(still) - 2
    sums, (L, delta), columns = refs[:split], refs[split : split + 2], refs[split + 2 :]
    b, h, m, j = (pl.program_id(axis) for axis in range(4))
    Bk, place = plan.sizes.k, plan.place(b, h, H, m, pl.num_programs(2))
    begin = j * plan.keys_a_fetch
    of_head = None if extras is None else extras.at[0]
    of_rows = None if rows is None else rows.at[0, 0, 0]
    row_segments = None if q_segments is None else q_segments[0, 0]
    walk = tpu_plan.walk(visit[place], clear[place], begin, plan.keys_a_fetch)

    @pl.when(j == 0)
    def start():
        for each in sums:
            each[...] = jnp.zeros(each.shape, each.dtype)
        L[...], delta[...] = tiles.as_columns(stats[0, 0, 0])
        tpu_tile.fill_columns(plan, of_rows, row_segments, columns)
        if plan.decays:  # lse less the rows' own share of the decay, for clear blocks
            hi, lo = columns[0][...], columns[1][...]
            columns[2][...] = L[...] - ((hi - hi[:1]) + (lo - lo[:1]))

    def exponentials(n, masked):
        x, pull, shift = tiles.product_transposed(q[0, 0, 0], k[0, 0, n - begin]), None, L
        if plan.linear is not None and not masked:
            X = x * (plan.linear * LOG2E)
            if plan.decays:
                c, ref, shift = cols[0, 0, n - begin], rows[0, 0, 0, :, :1], columns[2]
                X = X + ((ref[:1] - c[:1]) + (ref[1:] - c[1:]))
        else:
            of_cols = None if cols is None else cols.at[0, 0, n - begin]
            col_segments = None if kv_segments is None else kv_segments[0, n - begin]
            tile = tpu_tile.upright(plan, offset[0], m, n, of_cols, of_head, col_segments, columns)
            X, pull = tpu_tile.scores(plan, x, tile, limits, b, masked)
        P[...] = jnp.exp2(X - tiles.widen(shift[...], Bk))
        return pull

    def first(t, masked):
        n = walk.block(t)
        pull = exponentials(n, masked)
        dx = P[...] * (
            tiles.product_transposed(do[0, 0, 0], v[0, 0, n - begin]) - tiles.widen(delta[...], Bk)
        )
        if pull is not None:
            dx, of_rows, _, of_extras = pull(dx)
            for place, each in enumerate(of_rows):
                sums[1 + place][...] += jnp.broadcast_to(each, sums[1 + place].shape)
            for place, each in enumerate(of_extras):
                sums[-1][place : place + 1] += jnp.broadcast_to(each, (1, LANES))
        dX[...] = dx.astype(dX.dtype)

    def second(t):
        sums[0][...] += tiles.product(dX[...], k[0, 0, walk.block(t) - begin])

    def both(t, masked):
        second(t - 1)
        first(t, masked)

    tpu_plan.pipeline(walk, 1, first, second, both)

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        out[0][0, 0, 0] = (sums[0][...] * (1.0 if plan.linear is None else plan.linear)).astype(out[0].dtype)
        if rows is not None and not plan.decays:
            for n in range(rows.shape[3]):
                out[1][0, 0, 0, n : n + 1] = tiles.as_row(sums[1 + n][...])
        if extras is not None:
            out[-1][0, 0, 0] = sums[-1][...]


def backward_kv(plan: Plan, q, k, v, rows, cols, extras, stats, do, visits: Visits):
    """dk as k, dv as v, and dcols [B, H, nk, C, Bk]: of a decay only the sums of dS over the rows, C = 1."""
    (B, H, nq, Bq, D), (K, nk, Bk, Dv) = q.shape, v.shape[1:]
    G, fetched = H // K, plan.queries_a_fetch

    def of_key(b, kh, n, g, j, *_):
        return b, kh, n, 0, 0

    def of_head_key(b, kh, n, g, j, *_):
        return b, kh * G + g, n, 0, 0

    def place_of_queries(b, kh, n, g, j, offset, limits, visit, clear):
        return tpu_plan.clamp(j, visit[plan.place(b, kh * G + g, H, n, nk)], fetched)

    def of_query(b, kh, n, g, j, *scalars):
        return b, kh * G + g, place_of_queries(b, kh, n, g, j, *scalars), 0, 0

    specs = [
        (q, pl.BlockSpec((1, 1, fetched, Bq, D), of_query)),
        (k, pl.BlockSpec((1, 1, 1, Bk, D), of_key)),
        (v, pl.BlockSpec((1, 1, 1, Bk, Dv), of_key)),
        (stats, pl.BlockSpec((1, 1, fetched, 2, Bq), of_query)),
        (do, pl.BlockSpec((1, 1, fetched, Bq, Dv), of_query)),
        (rows, rows is not None and pl.BlockSpec((1, 1, fetched, rows.shape[3], Bq), of_query)),
        (cols, cols is not None and pl.BlockSpec((1, 1, 1, cols.shape[3], Bk), of_head_key)),
        (extras, extras is not None
         and pl.BlockSpec((1, *extras.shape[1:]), lambda b, kh, n, g, *_: (kh * G + g, 0, 0))),
        (visits.q_segments,
         pl.BlockSpec((1, fetched, 1, Bq), lambda b, *g: (b, place_of_queries(b, *g), 0, 0))),
        (visits.kv_segments, pl.BlockSpec((1, 1, 1, Bk), lambda b, kh, n, *_: (b, n, 0, 0))),
    ]  # fmt: skip
    results = [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)]
    out_specs = [pl.BlockSpec((1, 1, 1, Bk, D), of_key), pl.BlockSpec((1, 1, 1, Bk, Dv), of_key)]
    count = 0 if cols is None else 1 if plan.decays else cols.shape[3]
    if count:
        results.append(jax.ShapeDtypeStruct((B, H, nk, count, Bk), jnp.float32))
        out_specs.append(pl.BlockSpec((1, 1, 1, count, Bk), of_head_key))
    sums, still = [(Bk, D), (Bk, Dv)], [(Bk, LANES)] * count
    dtypes = tpu_tile.column_dtypes(plan, 0 if cols is None else cols.shape[3])
    operands = [x for x, _ in specs if x is not None]
    dk, dv, *others = pl.pallas_call(
        partial(_kernel_kv, plan, H, G, tuple(x is not None for x, _ in specs), count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, K, nk, G, nq // fetched),
            in_specs=[spec for x, spec in specs if x is not None],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums]
            + [pltpu.VMEM((Bk, Bq), dtype) for dtype in (jnp.float32, q.dtype, q.dtype)]
            + [pltpu.VMEM(shape, jnp.float32) for shape in still]
            + [pltpu.VMEM((Bk, LANES), dtype) for dtype in dtypes],
        ),
        out_shape=results,
        compiler_params=tpu_plan.compiler_params(
            "parallel", "parallel", "parallel", "arbitrary", "arbitrary"
        ),
        cost_estimate=tpu_plan.cost(plan, B * H, operands, results, of_q=2, of_v=2, D=D, Dv=Dv),
        interpret=plan.interpret,
        name=tpu_plan.name(plan, "backward_kv"),
    )(visits.offset, visits.limits, visits.queries, visits.clear_queries, *operands)
    return dk, dv, others[0] if others else None


def _kernel_kv(plan, H, G, present, count, offset, limits, visit, clear, *refs):
    refs = iter(refs)
    operands = [next(refs) if here else None for here in present]
    q, k, v, stats, do, rows, cols, extras, q_segments, kv_segments = operands
    dk, dv = next(refs), next(refs)
    dcols = next(refs) if count else None
    of_k, of_v, P, weights, dX, *refs = refs
    sums, columns = refs[:count], refs[count:]
    b, kh, n, g, j = (pl.program_id(axis) for axis in range(5))
    (Bq, Bk), place = (plan.sizes.q, plan.sizes.k), plan.place(b, kh * G + g, H, n, pl.num_programs(2))
    begin = j * plan.queries_a_fetch
    of_head = None if extras is None else extras.at[0]
    of_cols = None if cols is None else cols.at[0, 0, 0]
    col_segments = None if kv_segments is None else kv_segments[0, 0]
    walk = tpu_plan.walk(visit[place], clear[place], begin, plan.queries_a_fetch)

    @pl.when((g == 0) & (j == 0))
    def start():
        of_k[...], of_v[...] = jnp.zeros(of_k.shape, of_k.dtype), jnp.zeros(of_v.shape, of_v.dtype)

    @pl.when(j == 0)
    def start_head():
        for each in sums:
            each[...] = jnp.zeros(each.shape, each.dtype)
        tpu_tile.fill_columns(plan, of_cols, col_segments, columns)
        if plan.decays:  # c_ref - c_j, ref the last key of the block
            ref = of_cols[:, Bk - 1 :]
            differences = (ref[:1] - of_cols[:1]) + (ref[1:] - of_cols[1:])
            for at in tpu_tile.lanes(Bk):
                columns[2][at] = tiles.as_columns(differences[:, at])[0]

    def exponentials(m, masked):
        query, stat = q[0, 0, m - begin], stats[0, 0, m - begin]
        x, pull, shift = tiles.product_transposed(k[0, 0, 0], query), None, stat[:1]
        if plan.linear is not None and not masked:
            X = x * (plan.linear * LOG2E)
            if plan.decays:
                c, ref = rows[0, 0, m - begin], cols[0, 0, 0, :, Bk - 1 :]
                shift = shift - ((c[:1] - ref[:1]) + (c[1:] - ref[1:]))
                X = X + tiles.widen(columns[2][...], Bq)
        else:
            of_rows = None if rows is None else rows.at[0, 0, m - begin]
            row_segments = None if q_segments is None else q_segments[0, m - begin]
            tile = tpu_tile.transposed(
                plan, offset[0], m, n * Bk, Bk, of_rows, of_head, row_segments, columns
            )
            X, pull = tpu_tile.scores(plan, x, tile, limits, b, masked)
        P[...] = jnp.exp2(X - shift)
        weights[...] = P[...].astype(weights.dtype)
        return pull

    def products(m, pull):
        dx = P[...] * (tiles.product_transposed(v[0, 0, 0], do[0, 0, m - begin]) - stats[0, 0, m - begin, 1:])
        if plan.decays:
            sums[0][...] += tiles.partial_sums(dx)
        if pull is not None:
            dx, _, of_cols, _ = pull(dx)
            for c, each in enumerate(of_cols):
                sums[c][...] += jnp.broadcast_to(each, sums[c].shape)
        dX[...] = dx.astype(dX.dtype)

    def first(t, masked):
        m = walk.block(t)
        products(m, exponentials(m, masked))

    def of_values(t):
        dout = do[0, 0, walk.block(t) - begin]
        of_v[...] += tiles.product(weights[...], dout)

    def of_keys(t):
        query = q[0, 0, walk.block(t) - begin]
        of_k[...] += tiles.product(dX[...], query)

    def second(t):
        of_values(t)
        of_keys(t)

    def both(t, masked):
        m = walk.block(t)
        of_values(t - 1)
        pull = exponentials(m, masked)
        of_keys(t - 1)
        products(m, pull)

    tpu_plan.pipeline(walk, 1, first, second, both)

    @pl.when(j == pl.num_programs(4) - 1)
    def finish_head():
        for c in range(count):
            finish = tiles.sums_as_row if plan.decays else tiles.as_row
            dcols[0, 0, 0, c : c + 1] = finish(sums[c][...])

    @pl.when((g == G - 1) & (j == pl.num_programs(4) - 1))
    def finish():
        dk[0, 0, 0] = (of_k[...] * (1.0 if plan.linear is None else plan.linear)).astype(dk.dtype)
        dv[0, 0, 0] = of_v[...].astype(dv.dtype)
