"""Streaming attention on a GPU, backward: a program a block of queries gives dq, one a block of keys dk and dv.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D, Dv head sizes; m one of nq blocks
of Bq rows, n one of nk blocks of Bk keys. P weights, recomputed from the products x and lse; dS the gradient of scores:

    P = exp(score(x) - lse)    dS = P (do v^T - delta)    dx = the score's derivative dS    delta = sum o do - dlse
    dq = sum_n dx k            dk = sum_m dx^T q          dv = sum_m P^T do

A program of keys holds blocks [Bk, Bq], transposed, and runs over the G query heads: k and v are never repeated.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.streaming.arguments import Values
from kernels.streaming.gpu_forward import cost, key_segments, mask_specs, row_block, row_specs, wide
from kernels.streaming.gpu_tiles import Plan, Visits, dot, load, sides, store, sweep, visible
from kernels.tiles import LOG2E


def backward(plan: Plan, q, k, v, values: Values, visits: Visits, lse, delta, do):
    """dq, dk, dv in their dtypes and the gradient of values; lse (finite) and delta [B, H, T], do [B, T, H, Dv]."""
    dq, drows, dextras = _of_queries(plan, q, k, v, values, visits, lse, delta, do)
    dk, dv, dcols = _of_keys(plan, q, k, v, values, visits, lse, delta, do)
    return (
        dq,
        dk,
        dv,
        Values(
            _spread(plan.wants.rows, drows, values.rows),
            _spread(plan.wants.cols, dcols, values.cols),
            _spread(plan.wants.extras, [x.sum((0, 2)) for x in dextras], values.extras),
        ),
    )


def _spread(wants, found, values):
    """Gradients of the wanted values, zeros for the others."""
    found = iter(found)
    return tuple(next(found) if want else jnp.zeros_like(x) for want, x in zip(wants, values, strict=True))


def _of_queries(plan, q, k, v, values, visits, lse, delta, do):
    (B, T, H, D), Dv, tiles, wants = q.shape, v.shape[-1], plan.of_queries, plan.wants
    last = T // tiles.q - 1
    row = pl.BlockSpec((None, None, tiles.q), lambda m, h, b: (b, h, last - m))
    block = pl.BlockSpec((None, tiles.q, None, wide(D)), lambda m, h, b: (b, last - m, h, 0))
    of_do = pl.BlockSpec((None, tiles.q, None, wide(Dv)), lambda m, h, b: (b, last - m, h, 0))
    one = pl.BlockSpec((None, None, 1), lambda m, h, b: (b, h, last - m))
    number = jax.ShapeDtypeStruct
    return plan.call(
        _query_kernel(D, Dv), tiles, name=f"{plan.name}_dq", grid=(T // tiles.q, H, B),
        in_specs=(*row_specs(tiles, q, k, v, values, visits.mask), row, row, of_do),
        out_specs=(block, (row,) * sum(wants.rows), (one,) * sum(wants.extras)),
        out_shape=(number(q.shape, q.dtype), (number((B, H, T), jnp.float32),) * sum(wants.rows),
                   (number((B, H, last + 1), jnp.float32),) * sum(wants.extras)),
        cost_estimate=cost(plan, q, k, v, products=3),
    )(visits.of_queries, visits.mask, q, k, v, values, lse, delta, do)  # fmt: skip


def _query_kernel(D, Dv):
    def kernel(plan, visits, mask, q, k, v, values, lse, delta, do, dq, drows, dextras):
        tiles, wants = plan.of_queries, plan.wants
        m = pl.num_programs(0) - 1 - pl.program_id(0)
        rows, of_rows, segments, extras = row_block(m, tiles, mask, values)
        extras = tuple(
            jnp.broadcast_to(x, (tiles.q, 1)) for x in extras
        )  # their gradient is summed at the end
        queries, cotangent = load(q, 0, tiles.q, D), load(do, 0, tiles.q, Dv)
        lse2, delta = lse[...][:, None] * LOG2E, delta[...][:, None]

        def step(masked, n, carry):
            start = pl.multiple_of(n * tiles.k, tiles.k)
            cols = start + jnp.arange(tiles.k, dtype=jnp.int32)[None, :]
            of_cols = tuple(each[pl.ds(start, tiles.k)][None, :] for each in values.cols)
            keys = load(k, start, tiles.k, D)
            x = dot(plan, queries, keys, axis=1)
            seen = None
            if masked:
                seen = visible(plan, mask, rows, cols, segments, key_segments(mask, start, tiles))
            P, pull = _weights(plan, x, rows, cols, Values(of_rows, of_cols, extras), lse2, seen,
                               Values(wants.rows, (False,) * len(of_cols), wants.extras))  # fmt: skip
            dS = P * (dot(plan, cotangent, load(v, start, tiles.k, Dv), axis=1) - delta)
            dx, *rest = pull(dS)
            total, *sums = carry
            return total + dot(plan, dx.astype(keys.dtype), keys), *(
                x + y for x, y in zip(sums, rest, strict=True)
            )

        sums = (jnp.zeros((tiles.q, 1), jnp.float32),) * (len(drows) + len(dextras))
        start = jnp.zeros((tiles.q, wide(D)), jnp.float32), *sums
        total, *sums = sweep([visits[i] for i in range(4)], step, start, **sides(plan, mask, along_keys=True))
        store(dq, total, D)
        for ref, x in zip(drows, sums, strict=False):
            ref[...] = x.reshape(tiles.q)
        for ref, x in zip(dextras, sums[len(drows) :], strict=True):
            ref[0] = x.sum()

    return kernel


def _of_keys(plan, q, k, v, values, visits, lse, delta, do):
    (B, T, H, D), (S, K, Dv), tiles = q.shape, v.shape[1:], plan.of_keys
    G, wanted = H // K, sum(plan.wants.cols)
    per_head = pl.BlockSpec((None, G, T), lambda n, h, b: (b, h, 0))
    of_keys = pl.BlockSpec((None, G, tiles.k), lambda n, h, b: (b, h, n))

    def whole(D):
        return pl.BlockSpec((None, T, G, wide(D)), lambda n, h, b: (b, 0, h, 0))

    def block(D):
        return pl.BlockSpec((None, tiles.k, None, wide(D)), lambda n, h, b: (b, n, h, 0))

    by_value = Values(
        (per_head,) * len(values.rows), (of_keys,) * len(values.cols),
        (pl.BlockSpec((G,), lambda n, h, b: (h,)),) * len(values.extras),
    )  # fmt: skip
    mask = mask_specs(visits.mask, rows=(T, lambda n, h, b: (b, 0)), cols=(tiles.k, lambda n, h, b: (b, n)))
    seen = pl.BlockSpec((None, G, None, 4), lambda n, h, b: (b, h, n, 0))
    return plan.call(
        _key_kernel(D, Dv, G), tiles, name=f"{plan.name}_dkv", grid=(S // tiles.k, K, B),
        in_specs=(seen, mask, whole(D), block(D), block(Dv), by_value, per_head, per_head, whole(Dv)),
        out_specs=(block(D), block(Dv), (of_keys,) * wanted),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype),
                   (jax.ShapeDtypeStruct((B, H, S), jnp.float32),) * wanted),
        cost_estimate=cost(plan, q, k, v, products=4),
    )(visits.of_keys, visits.mask, q, k, v, values, lse, delta, do)  # fmt: skip


def _key_kernel(D, Dv, G):
    def kernel(plan, visits, mask, q, k, v, values, lse, delta, do, dk, dv, dcols):
        tiles, wants = plan.of_keys, plan.wants
        first = pl.multiple_of(pl.program_id(0) * tiles.k, tiles.k)
        cols = first + jnp.arange(tiles.k, dtype=jnp.int32)[:, None]
        segments = mask["kv_segments"][...][:, None] if "kv_segments" in mask else None
        keys, of_v = load(k, 0, tiles.k, D), load(v, 0, tiles.k, Dv)

        def head(g, totals):
            of_cols, extras = tuple(x[g, :][:, None] for x in values.cols), tuple(x[g] for x in values.extras)

            def step(masked, m, carry):
                start = pl.multiple_of(m * tiles.q, tiles.q)
                rows = mask["offset"][0] + start + jnp.arange(tiles.q, dtype=jnp.int32)[None, :]
                of_rows, lse2, less = ([x[g, pl.ds(start, tiles.q)][None, :] for x in each]
                                       for each in (values.rows, [lse], [delta]))  # fmt: skip
                queries, cotangent = load(q, start, tiles.q, D, g), load(do, start, tiles.q, Dv, g)
                x = dot(plan, keys, queries, axis=1)
                seen = None
                if masked:
                    of_queries = (
                        None if segments is None else mask["q_segments"][pl.ds(start, tiles.q)][None, :]
                    )
                    seen = visible(plan, mask, rows, cols, of_queries, segments)
                none = (False,) * len(of_rows), (False,) * len(extras)
                P, pull = _weights(plan, x, rows, cols, Values(tuple(of_rows), of_cols, extras), lse2[0] * LOG2E,
                                   seen, Values(none[0], wants.cols, none[1]))  # fmt: skip
                of_k, total_v, *sums = carry
                total_v = total_v + dot(plan, P.astype(do.dtype), cotangent)
                dS = P * (dot(plan, of_v, cotangent, axis=1) - less[0])
                dx, *rest = pull(dS)
                of_k = of_k + dot(plan, dx.astype(queries.dtype), queries)
                return of_k, total_v, *(x + y for x, y in zip(sums, rest, strict=True))

            sums = (jnp.zeros((tiles.k, 1), jnp.float32),) * len(dcols)
            ends = [visits[g, i] for i in range(4)]
            of_k, total_v, *sums = sweep(ends, step, (*totals, *sums), **sides(plan, mask, along_keys=False))
            for ref, x in zip(dcols, sums, strict=True):
                ref[g, :] = x.reshape(tiles.k)
            return of_k, total_v

        totals = jnp.zeros((tiles.k, wide(D)), jnp.float32), jnp.zeros((tiles.k, wide(Dv)), jnp.float32)
        only = pl.program_id(1) * 0  # a traced 0: masked loads take no other index
        of_k, total_v = head(only, totals) if G == 1 else jax.lax.fori_loop(0, G, head, totals)
        store(dk, of_k, D)
        store(dv, total_v, Dv)

    return kernel


def _weights(plan, x, rows, cols, values, lse2, seen, wants):
    """P of a block, and the pull-back of dS to dx and to the wanted values."""
    wanted = [x for want, x in zip(jax.tree.leaves(wants), jax.tree.leaves(values), strict=True) if want]

    def score(x, *wanted):
        found = iter(wanted)
        mine = jax.tree.map(lambda want, x: next(found) if want else x, wants, values)
        return plan.score(x, rows, cols, mine.rows, mine.cols, mine.extras)

    X, pull = jax.vjp(score, x, *wanted)
    # Above the diagonal, and in rows filled up, the score may exceed lse; those pairs carry no cotangent.
    P = jnp.exp2(jnp.minimum(X * LOG2E - lse2, 0.0))
    return P if seen is None else jnp.where(seen, P, 0.0), pull
