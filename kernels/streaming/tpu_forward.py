"""Streaming attention on TPU, forward: one program a query block, online softmax over the keys it visits.

Letters as in `tpu_plan.py`; A, mu, Z are the running numerator, maximum and normaliser of the online softmax, mu and
the scores X in units of log 2. A grid step brings `keys_a_fetch` key blocks and loops over those to visit: first the
blocks with masked pairs, then the others, without any mask arithmetic.

With a decay c_i - c_j and c_ref that of the block's first row, clear blocks add c_ref - c_j, one vector a block, to the
products; c_i - c_ref, one number a row, only meets the maximum. Both have one sign there, so nothing cancels; in the
others the difference is taken pair by pair.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import tiles
from kernels.streaming import tpu_plan, tpu_tile
from kernels.streaming.tpu_plan import Plan, Visits
from kernels.tiles import LANES, LN2, LOG2E, LOWEST


def forward(plan: Plan, q, k, v, rows, cols, extras, visits: Visits) -> tuple[jax.Array, jax.Array]:
    """o [B, H, nq, Bq, Dv] in q's dtype and lse float32 [B, H, nq, 1, Bq], -inf where no key is visible."""
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
        (rows, rows is not None and pl.BlockSpec((1, 1, 1, rows.shape[3], Bq), of_query)),
        (cols, cols is not None and pl.BlockSpec((1, 1, fetched, cols.shape[3], Bk), of_head_key)),
        (extras, extras is not None and pl.BlockSpec((1, *extras.shape[1:]), lambda b, h, *_: (h, 0, 0))),
        (visits.q_segments, pl.BlockSpec((1, 1, 1, Bq), lambda b, h, m, j, *_: (b, m, 0, 0))),
        (
            visits.kv_segments,
            pl.BlockSpec((1, fetched, 1, Bk), lambda b, h, *g: (b, place_of_keys(b, h, *g), 0, 0)),
        ),
    ]
    dtypes = tpu_tile.column_dtypes(plan, 0 if rows is None else rows.shape[3])
    scratch = [pltpu.VMEM((Bq, size), jnp.float32) for size in (Dv, LANES, LANES)]
    results = [
        jax.ShapeDtypeStruct((B, H, nq, Bq, Dv), q.dtype),
        jax.ShapeDtypeStruct((B, H, nq, 1, Bq), jnp.float32),
    ]
    operands = [x for x, _ in specs if x is not None]
    return pl.pallas_call(
        partial(_kernel, plan, H, tuple(x is not None for x, _ in specs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, H, nq, nk // fetched),
            in_specs=[spec for x, spec in specs if x is not None],
            out_specs=[pl.BlockSpec((1, 1, 1, Bq, Dv), of_query), pl.BlockSpec((1, 1, 1, 1, Bq), of_query)],
            scratch_shapes=scratch + [pltpu.VMEM((Bq, LANES), dtype) for dtype in dtypes],
        ),
        out_shape=results,
        compiler_params=tpu_plan.compiler_params("parallel", "parallel", "parallel", "arbitrary"),
        cost_estimate=tpu_plan.cost(plan, B * H, operands, results, of_q=1, of_v=1, D=D, Dv=Dv),
        interpret=plan.interpret,
        name=tpu_plan.name(plan, "forward"),
    )(visits.offset, visits.limits, visits.keys, visits.clear_keys, *operands)


def _kernel(plan, H, present, offset, limits, visit, clear, *refs):
    refs = iter(refs)
    q, k, v, rows, cols, extras, q_segments, kv_segments = (next(refs) if here else None for here in present)
    o, lse, A, mu, Z, *columns = refs
    b, h, m, j = (pl.program_id(axis) for axis in range(4))
    Bk, place = plan.sizes.k, plan.place(b, h, H, m, pl.num_programs(2))
    begin = j * plan.keys_a_fetch
    of_head = None if extras is None else extras.at[0]
    of_rows = None if rows is None else rows.at[0, 0, 0]
    row_segments = None if q_segments is None else q_segments[0, 0]
    mixed, before, go_on, count, low, high = tpu_plan.parts(
        *tpu_plan.unpack(visit[place]), *tpu_plan.unpack(clear[place]), begin, plan.keys_a_fetch)  # fmt: skip

    @pl.when(j == 0)
    def start():
        A[...], Z[...] = jnp.zeros(A.shape, A.dtype), jnp.zeros(Z.shape, Z.dtype)
        mu[...] = jnp.full(mu.shape, LOWEST, mu.dtype)
        tpu_tile.fill_columns(plan, of_rows, row_segments, columns)
        if plan.decays:
            hi, lo = columns[0][...], columns[1][...]
            columns[2][...] = (hi - hi[:1]) + (lo - lo[:1])

    def scores(x, n, masked):
        """X of the block in units of log 2, and what to add to its rows' maxima."""
        if plan.linear is not None and not masked:
            x = x * (plan.linear * LOG2E)
            if not plan.decays:
                return x, None
            c, ref = cols[0, 0, n - begin], rows[0, 0, 0, :, :1]
            return x + ((ref[:1] - c[:1]) + (ref[1:] - c[1:])), columns[2][...]
        of_cols = None if cols is None else cols.at[0, 0, n - begin]
        col_segments = None if kv_segments is None else kv_segments[0, n - begin]
        tile = tpu_tile.upright(plan, offset[0], m, n, of_cols, of_head, col_segments, columns)
        return tpu_tile.scores(plan, x, tile, limits, b, masked)[0], None

    def step(n, masked):
        key, value = k[0, 0, n - begin], v[0, 0, n - begin]
        X, u = scores(tiles.product_transposed(q[0, 0, 0], key), n, masked)
        top = X.max(1, keepdims=True)
        old = mu[...]
        new = jnp.maximum(old, top if u is None else top + u)
        mu[...] = new
        E = jnp.exp2(X - tiles.widen(new if u is None else new - u, Bk))
        shrink = jnp.exp2(old - new)
        Z[...] = Z[...] * shrink + tiles.partial_sums(E)
        A[...] = A[...] * tiles.widen(shrink, A.shape[1]) + tiles.product(E.astype(value.dtype), value)

    @pl.loop(0, count)
    def mixed_blocks(t):
        step(jnp.where(t < before, mixed + t, go_on + t - before), True)

    @pl.loop(low, high)
    def clear_blocks(n):
        step(n, False)

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        total = jnp.broadcast_to(Z[...].sum(1, keepdims=True), Z.shape)
        some = jnp.where(total > 0, total, 1)
        o[0, 0, 0] = (A[...] * tiles.widen(1 / some, A.shape[1])).astype(o.dtype)
        lse[0, 0, 0] = tiles.as_row(jnp.where(total > 0, mu[...] * LN2 + jnp.log(some), -jnp.inf))
