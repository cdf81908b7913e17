"""Streaming attention on a GPU, forward: a program a block of query rows, which runs over the keys it sees.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D, Dv head sizes; m one of nq blocks
of Bq rows, n one of nk blocks of Bk keys. x products, X scores in base 2, mu running maximum, Z sum of
exponentials, A of values so weighted.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.streaming.arguments import Values
from kernels.streaming.gpu_tiles import Plan, Visits, dot, load, sides, store, sweep, visible
from kernels.tiles import LN2, LOG2E, LOWEST, MASKED


def forward(plan: Plan, q, k, v, values: Values, visits: Visits) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] in q's dtype and lse [B, H, T]; q [B, T, H, D], values [B, H, T or S] and [H]; whole blocks."""
    (B, T, H, D), Dv, tiles = q.shape, v.shape[-1], plan.forward
    specs = row_specs(plan.forward, q, k, v, values, visits.mask)
    of_rows = pl.BlockSpec((None, None, tiles.q), lambda m, h, b: (b, h, T // tiles.q - 1 - m))
    o = pl.BlockSpec((None, tiles.q, None, wide(Dv)), lambda m, h, b: (b, T // tiles.q - 1 - m, h, 0))
    return plan.call(
        _kernel(D, Dv), tiles, name=f"{plan.name}_forward", grid=(T // tiles.q, H, B), in_specs=specs,
        out_specs=(o, of_rows), cost_estimate=cost(plan, q, k, v, products=2),
        out_shape=(jax.ShapeDtypeStruct((B, T, H, Dv), q.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)),
    )(visits.forward, visits.mask, q, k, v, values)  # fmt: skip


def row_specs(tiles, q, k, v, values, mask):
    """Specs of (visits, mask, q, k, v, values) for a program a block of rows; the longest rows start first."""
    (_, T, H, D), (_, S, K, Dv) = q.shape, v.shape
    last, G = T // tiles.q - 1, H // K
    of_kv = lambda m, h, b: (b, 0, jax.lax.div(h, G), 0)  # noqa: E731
    return (
        pl.BlockSpec((None, None, None, 4), lambda m, h, b: (b, h, last - m, 0)),
        mask_specs(mask, rows=(tiles.q, lambda m, h, b: (b, last - m)), cols=(S, lambda m, h, b: (b, 0))),
        pl.BlockSpec((None, tiles.q, None, wide(D)), lambda m, h, b: (b, last - m, h, 0)),
        pl.BlockSpec((None, S, None, wide(D)), of_kv),
        pl.BlockSpec((None, S, None, wide(Dv)), of_kv),
        Values(
            (pl.BlockSpec((None, None, tiles.q), lambda m, h, b: (b, h, last - m)),) * len(values.rows),
            (pl.BlockSpec((None, None, S), lambda m, h, b: (b, h, 0)),) * len(values.cols),
            (pl.BlockSpec((1,), lambda m, h, b: (h,)),) * len(values.extras),
        ),
    )


def mask_specs(mask, rows, cols):
    """Specs of `Visits.mask`; rows and cols are block size and index map of the segments."""
    specs = {
        "offset": pl.BlockSpec((1,), lambda m, h, b: (0,)),
        "starts": pl.BlockSpec((1,), lambda m, h, b: (b,)),
        "lengths": pl.BlockSpec((1,), lambda m, h, b: (b,)),
        "q_segments": pl.BlockSpec((None, rows[0]), rows[1]),
        "kv_segments": pl.BlockSpec((None, cols[0]), cols[1]),
    }
    return {name: specs[name] for name in mask}


def wide(D: int) -> int:
    """Columns of a tile of D: a power of two, at least what a tensor core multiplies."""
    return max(16, pl.next_power_of_2(D))


def cost(plan: Plan, q, k, v, products: int) -> pl.CostEstimate:
    """Of `products` products per pair; of a causal mask half of the pairs count."""
    (B, T, H, D), (S, Dv) = q.shape, (k.shape[1], v.shape[-1])
    pairs = B * H * T * S // (2 if plan.causal else 1)
    moved = sum(x.size * x.dtype.itemsize for x in (q, q, k, v))
    return pl.CostEstimate(flops=products * pairs * (D + Dv), transcendentals=pairs, bytes_accessed=moved)


def _kernel(D, Dv):
    def kernel(plan, visits, mask, q, k, v, values, o, lse):
        tiles = plan.forward
        m = pl.num_programs(0) - 1 - pl.program_id(0)
        rows, of_rows, segments, extras = row_block(m, tiles, mask, values)
        queries = load(q, 0, tiles.q, D)

        def step(masked, n, carry):
            A, mu, Z = carry
            start = pl.multiple_of(n * tiles.k, tiles.k)
            cols = start + jnp.arange(tiles.k, dtype=jnp.int32)[None, :]
            of_cols = tuple(each[pl.ds(start, tiles.k)][None, :] for each in values.cols)
            x = dot(plan, queries, load(k, start, tiles.k, D), axis=1)
            X = plan.score(x, rows, cols, of_rows, of_cols, extras) * LOG2E
            if masked:
                X = jnp.where(
                    visible(plan, mask, rows, cols, segments, key_segments(mask, start, tiles)), X, MASKED
                )
            higher = jnp.maximum(mu, X.max(1))
            E, shrink = jnp.exp2(X - higher[:, None]), jnp.exp2(mu - higher)
            A = A * shrink[:, None] + dot(plan, E.astype(v.dtype), load(v, start, tiles.k, Dv))
            return A, higher, Z * shrink + E.sum(1)

        start = jnp.zeros((tiles.q, wide(Dv)), jnp.float32), jnp.full((tiles.q,), LOWEST, jnp.float32)
        start = *start, jnp.zeros((tiles.q,), jnp.float32)
        A, mu, Z = sweep([visits[i] for i in range(4)], step, start, **sides(plan, mask, along_keys=True))
        some = jnp.where(Z > 0, Z, 1.0)
        store(o, A / some[:, None], Dv)
        lse[...] = jnp.where(Z > 0, (mu + jnp.log2(some)) * LN2, -jnp.inf)

    return kernel


def row_block(m, tiles, mask, values):
    """Of query block m: positions [Bq, 1], row values [Bq, 1], segments [Bq, 1] or None, scalars of the head."""
    rows = mask["offset"][0] + m * tiles.q + jnp.arange(tiles.q, dtype=jnp.int32)[:, None]
    segments = mask["q_segments"][...][:, None] if "q_segments" in mask else None
    of_rows = tuple(each[...][:, None] for each in values.rows)
    return rows, of_rows, segments, tuple(each[0] for each in values.extras)


def key_segments(mask, start, tiles):
    """Segments [1, Bk] of a block of keys, or None."""
    return mask["kv_segments"][pl.ds(start, tiles.k)][None, :] if "kv_segments" in mask else None
