"""Streaming attention on TPU, forward: one program a query block, online softmax over the keys it visits.

Letters as in `tpu_plan.py`; A, mu, Z are the running numerator, maximum and normaliser of the online softmax, mu and
the scores X in units of log 2. Tiles are transposed, [N, Bq] of N keys, so that what is one number a query is a row
vector, and A is [Dv, Bq]. A grid step brings `keys_a_fetch` key blocks and walks through those to visit in pieces of N
keys: first through the blocks with masked pairs, then through the others, without any mask arithmetic.

The products X of a piece are computed beside the exponentials E of the piece before; X waits in scratch memory. The
matrix unit takes the last rows of E first: Z is summed in that order, so that E needs few registers.

With a decay c_i - c_j and c_ref that of the block's first row, clear blocks add c_ref - c_j, one number a key, to the
products; c_i - c_ref, one number a query, only meets the maximum. Both have one sign there, so nothing cancels; in the
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
from kernels.tiles import LN2, LOG2E, LOWEST, SUBLANES

PIECE = 256  # keys in a piece, if a block is made of such pieces


def forward(plan: Plan, q, k, v, rows, cols, extras, visits: Visits) -> tuple[jax.Array, jax.Array]:
    """o [B, H, nq, Bq, Dv] in q's dtype and lse float32 [B, H, nq, 1, Bq], -inf where no key is visible."""
    (B, H, nq, Bq, D), (K, nk, Bk, Dv) = q.shape, v.shape[1:]
    fetched, N = plan.keys_a_fetch, Bk // pieces(Bk)
    v = v.swapaxes(-1, -2)

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
        (v, pl.BlockSpec((1, 1, fetched, Dv, Bk), of_key)),
        (rows, rows is not None and pl.BlockSpec((1, 1, 1, rows.shape[3], Bq), of_query)),
        (cols, cols is not None and pl.BlockSpec((1, 1, fetched, cols.shape[3], Bk), of_head_key)),
        (extras, extras is not None and pl.BlockSpec((1, *extras.shape[1:]), lambda b, h, *_: (h, 0, 0))),
        (visits.q_segments, pl.BlockSpec((1, 1, 1, Bq), lambda b, h, m, j, *_: (b, m, 0, 0))),
        (
            visits.kv_segments,
            pl.BlockSpec((1, fetched, 1, Bk), lambda b, h, *g: (b, place_of_keys(b, h, *g), 0, 0)),
        ),
    ]
    scratch = [(Dv, Bq), (1, Bq), (SUBLANES, Bq), (N, Bq), (1, Bq), (1, Bq)]
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
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
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
    o, lse, A, mu, Z, X, shift, shrink = refs
    b, h, m, j = (pl.program_id(axis) for axis in range(4))
    Bk, place = plan.sizes.k, plan.place(b, h, H, m, pl.num_programs(2))
    N, begin = X.shape[0], j * plan.keys_a_fetch
    of_head = None if extras is None else extras.at[0]
    of_rows = None if rows is None else rows.at[0, 0, 0]
    row_segments = None if q_segments is None else q_segments[0, 0]
    walk = tpu_plan.walk(visit[place], clear[place], begin, plan.keys_a_fetch)

    @pl.when(j == 0)
    def start():
        A[...], Z[...] = jnp.zeros(A.shape, A.dtype), jnp.zeros(Z.shape, Z.dtype)
        mu[...] = jnp.full(mu.shape, LOWEST, mu.dtype)

    def piece(t):
        """Key block n and the first of the keys in it."""
        if Bk == N:
            return walk.block(t), 0
        n = jax.lax.div(t, Bk // N)
        return walk.block(n), pl.multiple_of((t - n * (Bk // N)) * N, N)

    def scores(x, n, at, masked):
        """The scores of a piece in units of log 2, and what to add to its queries' maxima."""
        values = None if cols is None else cols[0, 0, n - begin, :, at]
        if plan.linear is not None and not masked:
            x = x * (plan.linear * LOG2E)
            if not plan.decays:
                return x, None
            r, ref = rows[0, 0, 0], rows[0, 0, 0, :, :1]
            c = tiles.as_columns((ref[:1] - values[:1]) + (ref[1:] - values[1:]))[0]
            return x + tiles.widen(c, x.shape[1]), (r[:1] - ref[:1]) + (r[1:] - ref[1:])
        columns = [] if values is None else tiles.as_columns(values)
        columns += [None] * plan.decays  # where the backward pass keeps one more
        if plan.segmented:
            columns += tiles.as_columns(kv_segments[0, n - begin, :, at])
        first = n * Bk + at.start
        tile = tpu_tile.transposed(plan, offset[0], m, first, N, of_rows, of_head, row_segments, columns)
        return tpu_tile.scores(plan, x, tile, limits, b, masked)[0], None

    def first(t, masked):
        n, at = piece(t)
        at = pl.ds(at, N)
        x, u = scores(tiles.product_transposed(k[0, 0, n - begin, at], q[0, 0, 0]), n, at, masked)
        X[...] = x
        top = x.max(0, keepdims=True)
        old = mu[...]
        new = jnp.maximum(old, top if u is None else top + u)
        mu[...], shrink[...] = new, jnp.exp2(old - new)
        shift[...] = new if u is None else new - u

    def second(t):
        n, at = piece(t)
        value = v[0, 0, n - begin, :, pl.ds(at, N)]
        E = jnp.exp2(X[...] - shift[...])
        Z[...] = Z[...] * shrink[...] + tpu_tile.sums_by_sublane(E)
        A[...] = A[...] * shrink[...] + tiles.product(value, E.astype(value.dtype))

    def both(t, masked):
        second(t - 1)
        first(t, masked)

    tpu_plan.pipeline(walk, Bk // N, first, second, both)

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        for at in tpu_tile.lanes(plan.sizes.q):
            total = Z[:, at].sum(0, keepdims=True)
            some = jnp.where(total > 0, total, 1)
            o[0, 0, 0, at] = (A[:, at] * (1 / some)).T.astype(o.dtype)
            lse[0, 0, 0, :, at] = jnp.where(total > 0, mu[:, at] * LN2 + jnp.log(some), -jnp.inf)


def pieces(Bk: int) -> int:
    """In how many pieces a block of keys is walked through."""
    return Bk // PIECE if Bk % PIECE == 0 else 1
