"""Softplus attention for CUDA GPUs, backward: dq by a program a block of rows, then dk and dv by one a block of keys.

Letters as in `gpu.py`, equations as in `tpu_backward.py`: the sweep for dq sums du phi' k and phi' k apart, because
G_i = sum_j du_ij is known at its end only.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.softplus import fused, tiles
from kernels.softplus.fused import pack
from kernels.softplus.gpu_tiles import dot, padded, rows_of, scores, shape_for, specs_of_rows, whole

OF_ROWS = ("drift", "c", "power")  # what the sweep for dq leaves besides dq


def backward(call, q, k, v, do, context, rows):
    """See `fused.Machine`."""
    T, S, D, Dv, (Bq, Bk) = q.shape[1], k.shape[1], k.shape[3], v.shape[3], (call.backward.q, call.backward.k)
    operands = [padded(x, block) for x, block in ((q, Bq), (k, Bk), (v, Bk), (do, Bq))]
    if context.key_segments is not None:
        operands.append(fused.pad(context.key_segments, 1, Bk))
    Tp = operands[0].shape[1]
    integers = pack(context.integers, Tp, -1)
    dq, of_rows = _queries(call, context.keys, pack(rows, Tp), integers, operands)
    of_rows = {name: of_rows[:, :, n, :T] for n, name in enumerate(OF_ROWS)}
    rows = {name: x for name, x in rows.items() if name != "threshold"}
    if call.options.mean_threshold:
        rows["drift"] = of_rows["drift"]
    dk, dv = _keys(call, context.queries, pack(rows, Tp), integers, operands)
    drows = {name: of_rows[name] for name in ("c", "power") if name in rows}
    return dq[:, :T, :, :D], dk[:, :S, :, :D], dv[:, :S, :, :Dv], drows


def _queries(call, ranges, floats, integers, operands):
    """dq [B, Tp, H, D] and the row vectors OF_ROWS [B, H, 3, Tp]."""
    (B, Tp, H, D), (_, Sp, K, Dv), Bq = operands[0].shape, operands[2].shape, call.backward.q
    of_query = partial(pl.BlockSpec, index_map=lambda m, h, b: (b, m, h, 0))
    in_specs = [
        pl.BlockSpec((None, *ranges.shape[1:]), lambda m, h, b: (b, 0, 0)),
        *specs_of_rows(len(floats[0]), len(integers[0]), Bq),
        of_query((None, Bq, None, D)),
        whole(Sp, D, H // K),
        whole(Sp, Dv, H // K),
        of_query((None, Bq, None, Dv)),
        pl.BlockSpec((None, Sp), lambda m, h, b: (b, 0)),
    ][: 3 + len(operands)]
    sums = 2 if call.options.mean_threshold else 1
    return pl.pallas_call(
        partial(_queries_kernel, call=call, names=(floats[0], integers[0])),
        grid=(Tp // Bq, H, B),
        in_specs=in_specs,
        out_specs=[
            of_query((None, Bq, None, D)),
            pl.BlockSpec((None, None, len(OF_ROWS), Bq), lambda m, h, b: (b, h, 0, m)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, Tp, H, D), operands[0].dtype),
            jax.ShapeDtypeStruct((B, H, len(OF_ROWS), Tp), jnp.float32),
        ],
        compiler_params=shape_for(D, Dv, operands[0].dtype).compiler_params,
        cost_estimate=_cost(operands, (1 + sums) * D + Dv, Tp // Bq * H // K),
        interpret=call.interpret,
        name="softplus_backward_queries",
    )(ranges, floats[1], integers[1], *operands)


def _queries_kernel(ranges, floats, integers, q, k, v, do, *rest, call, names):
    options, Bk, precise = call.options, call.backward.k, call.interpret is False
    segments, *rest = rest if "segment" in names[1] else (None, *rest)
    dq, of_rows = rest
    m = pl.program_id(0)
    rows, query, cotangent = rows_of(names, floats, integers), q[...], do[...]
    zero = jnp.zeros((query.shape[0], 1), jnp.float32)
    nothing = jnp.zeros(query.shape, jnp.float32)

    def step(n, carry):
        E, F, G, power = carry
        at = pl.ds(n * Bk, Bk)
        s, seen = scores(rows, query, k, segments, n * Bk, Bk, precise)
        dR = dot(cotangent, v[at, :].T, precise)
        _, da, moving, slope, dp = tiles.gradients(options, rows, s, seen, dR)
        E = E + dot((da * slope).astype(k.dtype), k[at, :], precise)
        if F is not None:
            F = F + dot(slope.astype(k.dtype), k[at, :], precise)
            G = G + moving.sum(1, keepdims=True)
        return E, F, G, power if dp is None else power + dp.sum(1, keepdims=True)

    carry = (nothing, nothing if options.mean_threshold else None, zero, zero)
    E, F, G, dpower = jax.lax.fori_loop(ranges[m, 0], ranges[m, 1], step, carry)
    if F is not None:
        G = G * rows["threshold"]
        E = E - G * F
    dq[...] = (E * rows["c"]).astype(dq.dtype)
    dc = (E * query.astype(jnp.float32)).sum(1, keepdims=True)
    for i, x in enumerate((G, dc, dpower)):
        of_rows[i, :] = x[:, 0]


def _keys(call, ranges, floats, integers, operands):
    """dk [B, Sp, K, D] and dv [B, Sp, K, Dv]; a program sums over the query heads of its key/value head."""
    (B, Tp, H, D), (_, Sp, K, Dv), Bk = operands[0].shape, operands[2].shape, call.backward.k
    G = H // K
    in_specs = [
        pl.BlockSpec((None, *ranges.shape[1:]), lambda n, h, b: (b, 0, 0)),
        pl.BlockSpec((None, G, len(floats[0]), Tp), lambda n, h, b: (b, h, 0, 0)),
        pl.BlockSpec((None, len(integers[0]), Tp), lambda n, h, b: (b, 0, 0)),
        pl.BlockSpec((None, Tp, G, D), lambda n, h, b: (b, 0, h, 0)),
        pl.BlockSpec((None, Bk, None, D), lambda n, h, b: (b, n, h, 0)),
        pl.BlockSpec((None, Bk, None, Dv), lambda n, h, b: (b, n, h, 0)),
        pl.BlockSpec((None, Tp, G, Dv), lambda n, h, b: (b, 0, h, 0)),
        pl.BlockSpec((None, Bk), lambda n, h, b: (b, n)),
    ][: 3 + len(operands)]
    return pl.pallas_call(
        partial(_keys_kernel, call=call, names=(floats[0], integers[0])),
        grid=(Sp // Bk, K, B),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((None, Bk, None, size), lambda n, h, b: (b, n, h, 0)) for size in (D, Dv)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[1:3]],
        compiler_params=shape_for(D, Dv, operands[0].dtype).params_of_keys,
        cost_estimate=_cost(operands, 2 * (D + Dv), 2),
        interpret=call.interpret,
        name="softplus_backward_keys",
    )(ranges, floats[1], integers[1], *operands)


def _keys_kernel(ranges, floats, integers, q, k, v, do, *rest, call, names):
    options, Bq, precise = call.options, call.backward.q, call.interpret is False
    segments, *rest = rest if "segment" in names[1] else (None, *rest)
    dk, dv = rest
    n, (Bk, _), G = pl.program_id(0), k.shape, q.shape[1]
    first, end = ranges[n, 0], ranges[n, 1]
    key, value = k[...].T, v[...].T
    index = jax.lax.broadcasted_iota(jnp.int32, (Bq, Bk), 1)
    segments = None if segments is None else segments[...][None]

    def step(i, carry):
        sum_dk, sum_dv = carry
        g = jax.lax.div(i, end - first)
        at = pl.ds((first + i - g * (end - first)) * Bq, Bq)
        query, cotangent = q[at, g, :], do[at, g, :]
        rows = rows_of(names, floats, integers, head=(g,), at=at)
        s, seen = tiles.scores(rows, dot(query, key, precise), index, n * Bk, segments)
        R, da, _, slope, _ = tiles.gradients(options, rows, s, seen, dot(cotangent, value, precise))
        da = da - rows["drift"] if "drift" in rows else da
        sum_dv = sum_dv + dot(R.astype(do.dtype).T, cotangent, precise)
        sum_dk = sum_dk + dot((da * slope * rows["c"]).astype(q.dtype).T, query, precise)
        return sum_dk, sum_dv

    carry = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    sum_dk, sum_dv = jax.lax.fori_loop(0, G * (end - first), step, carry)
    dk[...], dv[...] = sum_dk.astype(dk.dtype), sum_dv.astype(dv.dtype)


def _cost(operands, depth, reads):
    """`depth` is the sum of the depths of a tile's products, `reads` how often the keys are read."""
    q, k, v, do = operands[:4]
    pairs = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] // 2
    return pl.CostEstimate(
        flops=2 * pairs * depth,
        transcendentals=2 * pairs,
        bytes_accessed=2 * (q.nbytes + do.nbytes) + reads * (k.nbytes + v.nbytes) // 2,
    )
