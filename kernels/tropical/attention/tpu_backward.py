"""The backward pass of the TPU kernel: two kernels, one for queries and one for keys and values, nothing scattered.

Letters: see `tpu.py` and `gradients.py`; j the winners, g their cotangents, L the columns (lanes) of a tile. For every
block of queries and keys that holds a winner, R rows at a time:

    dS_ij = sum_d where(j_id = j, g_id, 0)          p, m = first argmax and argmin over d of q_id - k_jd, computed again
    dq_id += sum_j dS_ij (1[m = d] - 1[p = d])      dk_jd -= sum_i (same)      dv_jd += sum_i where(j_id = j, g_id, 0)
For dq queries lie on lanes and keys are rows; for dk and dv keys lie on lanes and queries are rows, so that every sum
runs over rows: registers are added, and only the last eight rows of a whole block are summed across. Masks and biases
play no part: what they hide has no winner. Tiles without any cotangent are passed over.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import masks
from kernels.tropical import tiles, vectors

OTHER = 128  # rows of a block, the other way round from the lanes


def of_queries(options, q, k, j, g) -> jax.Array:
    """dq [B, T, H, D] from the winners j and their cotangents g [B, T, H, Dv], 0 where there is no winner."""
    (B, T, H, D), K, Dv = q.shape, k.shape[2], j.shape[3]
    L, R = _sizes(options, options.sizes.q)
    q, j, g = (vectors.pad(x.transpose(0, 2, 3, 1), 3, L) for x in (q, j, g))  # [B, H, ., Tp]
    k = vectors.pad(k.swapaxes(1, 2), 2, R)  # [B, K, Sp, D]
    nq, nk = q.shape[3] // L, k.shape[2] // R
    visits = _visits(j.transpose(0, 1, 3, 2), T, L, R, nk)  # [B, H, nq, nk]
    bounds = [x.reshape(-1) for x in masks.key_block_range(visits)]

    def key_block(b, h, i, n, first, end):
        at = (b * H + h) * nq + i
        return b, jax.lax.div(h, H // K), jnp.maximum(jnp.minimum(first[at] + n, end[at] - 1), 0), 0

    def of_rows(size):
        return pl.BlockSpec((None, None, size, L), lambda b, h, i, n, *_: (b, h, 0, i))

    dq = pl.pallas_call(
        partial(_queries_kernel, options, (H, nq)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, H, nq, nk),
            in_specs=[of_rows(D), pl.BlockSpec((None, None, R, D), key_block), of_rows(Dv), of_rows(Dv)],
            out_specs=of_rows(D),
            scratch_shapes=[pltpu.VMEM((D, 8, L), jnp.float32), pltpu.VMEM((8, L), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        name="tropical_attention_backward_queries",
        **_settings(options, q.size * k.shape[2] * 12, 4 * (q.size * 4 + nq * H // K * k.size)),
    )(*bounds, q, k, j, g)
    return dq[..., :T].transpose(0, 3, 1, 2)


def of_keys(options, q, k, j, g) -> tuple[jax.Array, jax.Array]:
    """dk [B, S, K, D] and dv [B, S, K, Dv]; operands as in `of_queries`."""
    (B, T, H, D), (S, K), Dv = q.shape, k.shape[1:3], j.shape[3]
    L, R = _sizes(options, S)
    q, g = (vectors.pad(x.swapaxes(1, 2), 2, R) for x in (q, g))  # [B, H, Tp, .]
    j = vectors.pad(j.swapaxes(1, 2), 2, R, -1)
    k = vectors.pad(k.transpose(0, 2, 3, 1), 3, L)  # [B, K, D, Sp]
    nq, nk, G = q.shape[2] // R, k.shape[3] // L, H // K
    visits = _visits(j, T, R, L, nk)  # [B, H, nq, nk]
    bounds = [x.reshape(-1) for x in masks.query_block_range(visits)]  # [B, H, nk]

    def query_block(b, h, i, n, first, end):
        head = h * G + jax.lax.div(n, nq)
        at = (b * H + head) * nk + i
        return b, head, jnp.maximum(jnp.minimum(first[at] + jax.lax.rem(n, nq), end[at] - 1), 0), 0

    def of_rows(size):
        return pl.BlockSpec((None, None, R, size), query_block)

    def of_lanes(size):
        return pl.BlockSpec((None, None, size, L), lambda b, h, i, n, *_: (b, h, 0, i))

    dk, dv = pl.pallas_call(
        partial(_keys_kernel, options, (H, G, nq, nk)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, nk, G * nq),
            in_specs=[of_lanes(D), of_rows(D), of_rows(Dv), of_rows(Dv)],
            out_specs=[of_lanes(D), of_lanes(Dv)],
            scratch_shapes=[
                pltpu.VMEM((D, 8, L), jnp.float32),
                pltpu.VMEM((8, L), jnp.float32),
                pltpu.VMEM((Dv, 8, L), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, K, size, nk * L), jnp.float32) for size in (D, Dv)],
        name="tropical_attention_backward_keys",
        **_settings(options, q.size * k.shape[3] * 14, 4 * (k.size * 4 + nk * (q.size + 2 * g.size))),
    )(*bounds, k, q, j, g)
    return tuple(x[..., :S].transpose(0, 3, 1, 2) for x in (dk, dv))


def _sizes(options, length):
    """Lanes and rows of a block; few in a simulation."""
    lanes = options.lanes
    return min(options.widest, length + -length % lanes), min(OTHER, options.sizes.k)


def _settings(options, flops, bytes_accessed):
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        "cost_estimate": pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=bytes_accessed),
        "interpret": options.interpret,
    }


def _visits(j, T, rows, keys, nk):
    """Blocks that may hold a winner, bool [B, H, nq, nk], from j [B, H, Tp, Dv]: smallest to largest."""
    blocks = jnp.where((jnp.arange(j.shape[2]) < T)[:, None], j, -1)
    blocks = blocks.reshape(*j.shape[:2], -1, rows * j.shape[3])
    first = jnp.where(blocks < 0, masks.LARGEST, blocks).min(-1, keepdims=True) // keys
    n = jnp.arange(nk)
    return (first <= n) & (n <= blocks.max(-1, keepdims=True) // keys)


def _queries_kernel(options, sizes, first, end, q_ref, k_ref, j_ref, g_ref, dq_ref, total, every):
    """q, dq [D, L], k [R, D], j, g [Dv, L]; sums by rows [D, 8, L] and, for what all channels get, [8, L]."""
    b, h, i, n = (pl.program_id(axis) for axis in range(4))
    H, nq = sizes
    at = (b * H + h) * nq + i
    block = first[at] + n

    @pl.when(n == 0)
    def _start():
        total[...] = jnp.zeros(total.shape, total.dtype)
        every[...] = jnp.zeros(every.shape, every.dtype)

    @pl.when(block < end[at])
    def _step():
        def keys(r):
            shape = (r.size, q_ref.shape[1])
            key = block * k_ref.shape[0] + r.start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            ds = jnp.zeros(shape, jnp.float32)
            for j, g in zip(vectors.rows_of(j_ref), vectors.rows_of(g_ref), strict=True):
                ds += jnp.where(j == key, g, 0)
            _channels(options, q_ref, k_ref[r, :], ds, total, every, flip=False)

        vectors.in_groups(k_ref.shape[0], keys)

    @pl.when(n == pl.num_programs(3) - 1)
    def _end():
        _sum_rows(total, every, dq_ref)


def _keys_kernel(options, sizes, first, end, k_ref, q_ref, j_ref, g_ref, dk_ref, dv_ref, total, every, of_v):
    """k, dk [D, L], dv [Dv, L], q [R, D], j, g [R, Dv]; sums by rows as in `_queries_kernel`."""
    b, h, i, n = (pl.program_id(axis) for axis in range(4))
    H, G, nq, nk = sizes
    at = (b * H + h * G + jax.lax.div(n, nq)) * nk + i
    block = first[at] + jax.lax.rem(n, nq)

    @pl.when(n == 0)
    def _start():
        for x in (total, every, of_v):
            x[...] = jnp.zeros(x.shape, x.dtype)

    @pl.when(block < end[at])
    def _step():
        def queries(r):
            shape = (r.size, k_ref.shape[1])
            key = i * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            ds, j, g = jnp.zeros(shape, jnp.float32), j_ref[r, :], g_ref[r, :]
            for d in range(j.shape[1]):
                hit = jnp.where(j[:, d : d + 1] == key, g[:, d : d + 1], 0)
                ds += hit
                of_v[d] += _by_eight(hit)
            _channels(options, k_ref, q_ref[r, :], ds, total, every, flip=True)

        vectors.in_groups(q_ref.shape[0], queries)

    @pl.when(n == pl.num_programs(3) - 1)
    def _end():
        _sum_rows(total, every, dk_ref)
        _sum_rows(of_v, None, dv_ref)


def _channels(options, x_ref, y, ds, total, every, flip):
    """Add to total [D, 8, L] what the operand on lanes x_ref [D, L] gets of dS [R, L]; y [R, D] the other operand.

    flip: x_ref holds the keys. The sign of their gradient is the other one, but in maxplus_dot.
    """
    D, score = x_ref.shape[0], options.score

    @pl.when(jnp.logical_not(jnp.max(jnp.abs(ds)) == 0))
    def _some():
        high, low = jnp.full(ds.shape, -jnp.inf, ds.dtype), jnp.full(ds.shape, jnp.inf, ds.dtype)
        p, m = jnp.zeros(ds.shape, jnp.int32), jnp.zeros(ds.shape, jnp.int32)
        for d, x in enumerate(vectors.rows_of(x_ref)):
            of_y = y[:, d : d + 1]
            t = x + of_y if score == "maxplus_dot" else of_y - x if flip else x - of_y
            if score != "maxplus_dot":
                m, low = jnp.where(t < low, d, m), jnp.minimum(low, t)
            if score != "hilbert_asym":
                p, high = jnp.where(t > high, d, p), jnp.maximum(high, t)
        scaled = options.scale * (-ds if flip and score != "maxplus_dot" else ds)
        if score == "hilbert":  # all channels alike: p = m, and nothing depends on the operands
            scaled = jnp.where(p == m, 0, scaled)
        if score == "hilbert_asym":
            every[...] -= _by_eight(scaled)
            scaled = D * scaled

        def channel(d, _):
            if score == "hilbert":
                share = jnp.where(m == d, scaled, jnp.where(p == d, -scaled, 0))
            else:
                share = jnp.where((p if score == "maxplus_dot" else m) == d, scaled, 0)
            total[d] += _by_eight(share)
            return 0

        tiles.fold(D, channel, 0)


def _by_eight(x):
    """[R, L] -> [8, L]: sums of whole registers."""
    return sum(x[top : top + 8] for top in range(0, x.shape[0], 8))


def _sum_rows(total, every, out_ref):
    """Write sums over the eight rows of total [D, 8, L], plus those of `every` [8, L], to [D, L]."""
    more = 0 if every is None else every[...].sum(0, keepdims=True)

    def channel(d, _):
        out_ref[pl.ds(d, 1), :] = total[d].sum(0, keepdims=True) + more
        return 0

    jax.lax.fori_loop(0, out_ref.shape[0], channel, 0)
