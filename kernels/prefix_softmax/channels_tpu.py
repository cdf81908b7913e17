"""Prefix softmax on TPU where every channel is a head: channels lie on the lanes, positions are scanned by doubling.

Letters: B batch, S positions, H channels; a grid step takes R positions of L channels, in chunks of C; i a position.

    forward    M_i = max(M_{i-1}, s_i)   a_i = e^(M_{i-1} - M_i)   (z, n)_i = a_i (z, n)_{i-1} + e^(s_i - M_i) (1, v_i)
    backward   (G, R)_i = e^(M_i - M_{i+1}) (G, R)_{i+1} + (do_i, delta_i) / z_i
               dv_i = e^(s_i - M_i) G_i     ds_i = dv_i v_i - e^(s_i - M_i) R_i

G and R are the sums over rows from i on that `blockwise.py` has, scaled to M_i. A recurrence x_i = a_i x_{i-1} + b_i
takes log2 C steps over all of a chunk: at distance d, x_i += A_i x_{i-d} and A_i *= A_{i-d}. Factors are at most 1; a
document's first row has a factor of 0.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.prefix_softmax.arguments import exp_difference
from kernels.prefix_softmax.weights import exp_below

C = 64
LANES = 128


def channels(interpret, rows, s, v, state, runs):
    """The result of `tpu.tpu` for one channel a head, v [B, S, K, 1]; rows, a multiple of C, a grid step."""
    S, H = s.shape[1:]
    v = jnp.repeat(v[..., 0], H // v.shape[2], axis=2).astype(jnp.float32)
    begins = None if runs is None else jnp.pad(runs[:, 1:] != runs[:, :-1], ((0, 0), (1, -S % rows)))
    wide = -H % LANES if H > LANES else 0
    s = jnp.pad(s, ((0, 0), (0, -S % rows), (0, wide)), constant_values=-jnp.inf)
    v = jnp.pad(v, ((0, 0), (0, -S % rows), (0, wide)))
    m, z, n = state
    m = jnp.pad(m, ((0, 0), (0, wide)), constant_values=-jnp.inf)
    z, n = (jnp.pad(x, ((0, 0), (0, wide))) for x in (z, n[..., 0]))
    if begins is not None:
        begins = begins.astype(jnp.float32).reshape(len(begins), -1, rows // C, C)
    o, M, z = _attend(interpret, rows, s, v, (m, z, n), begins)
    return o[:, :S, :H, None], M[:, :S, :H], z[:, :S, :H]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(interpret, rows, s, v, state, begins):
    return _forward(interpret, rows, s, v, state, begins)[0]


def _forward(interpret, rows, s, v, state, begins):
    """s, v [B, S, H]; m, z, n [B, H]; begins 1 where another document begins, or None: o, M, z [B, S, H]."""
    B, S, H = s.shape
    lanes = min(H, LANES)
    block, one = _specs(rows, lanes, lambda t: t)
    shape = jax.ShapeDtypeStruct(s.shape, jnp.float32)
    out = pl.pallas_call(
        partial(_forward_kernel, rows // C, begins is not None),
        grid=(B, H // lanes, S // rows),
        in_specs=[block, block, one, one, one, *_begins_specs(begins, rows, lambda t: t)],
        out_specs=[block] * 3,
        out_shape=[shape] * 3,
        scratch_shapes=[pltpu.VMEM((1, lanes), jnp.float32)] * 3,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=50 * s.size, transcendentals=2 * s.size, bytes_accessed=20 * s.size
        ),
        interpret=interpret,
        name="prefix_softmax_channels_forward",
    )(s, v, *(x[:, None] for x in state), *([] if begins is None else [begins]))
    return tuple(out), (s, v, state, begins, *out)


def _backward(interpret, rows, residuals, cotangents):
    s, v, state, begins, o, M, z = residuals
    do, _, dz = cotangents
    B, S, H = s.shape
    lanes, last = min(H, LANES), s.shape[1] // rows - 1
    delta = do * o - z * dz
    block, one = _specs(rows, lanes, lambda t: last - t)
    shape, sums = jax.ShapeDtypeStruct(s.shape, jnp.float32), jax.ShapeDtypeStruct((B, 1, H), jnp.float32)
    ds, dv, G, R, ref = pl.pallas_call(
        partial(_backward_kernel, rows // C, begins is not None),
        grid=(B, H // lanes, S // rows),
        in_specs=[block] * 6 + _begins_specs(begins, rows, lambda t: last - t),
        out_specs=[block, block, one, one, one],
        out_shape=[shape, shape, sums, sums, sums],
        scratch_shapes=[pltpu.VMEM((1, lanes), jnp.float32)] * 4,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=50 * s.size, transcendentals=2 * s.size, bytes_accessed=32 * s.size
        ),
        interpret=interpret,
        name="prefix_softmax_channels_backward",
    )(s, v, M, z, delta, do, *([] if begins is None else [begins]))
    f = exp_difference(state[0], ref[:, 0])
    return ds, dv, (jnp.zeros_like(f), -f * R[:, 0], f * G[:, 0]), None


_attend.defvjp(_forward, _backward)


def _forward_kernel(chunks, packed, *refs):
    s_ref, v_ref, m0_ref, z0_ref, n0_ref, *begins_ref = refs[: 5 + packed]
    o_ref, M_ref, z_ref, m_state, z_state, n_state = refs[5 + packed :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        m_state[...], z_state[...], n_state[...] = m0_ref[0], z0_ref[0], n0_ref[0]

    def chunk(c, _):
        at = pl.ds(pl.multiple_of(c * C, C), C)
        s, v, begins = s_ref[0, at], v_ref[0, at], _begins(begins_ref, c, s_ref.shape[2]) if packed else None
        m, z, n = m_state[...], z_state[...], n_state[...]
        M, since = _running_maximum(s, begins)
        M = jnp.maximum(M, m) if since is None else jnp.where(since > 0, M, jnp.maximum(M, m))
        a = exp_below(_shifted(M, 1, m), M)
        a = a if begins is None else jnp.where(begins > 0, 0, a)
        w = exp_below(s, M)
        A, (z_rows, n_rows) = _recurrence(a, (w, w * v), 1)
        z_rows, n_rows = z_rows + A * z, n_rows + A * n
        o_ref[0, at], M_ref[0, at] = n_rows / jnp.where(z_rows > 0, z_rows, 1), M
        z_ref[0, at] = z_rows
        m_state[...], z_state[...], n_state[...] = M[C - 1 :], z_rows[C - 1 :], n_rows[C - 1 :]
        return 0

    jax.lax.fori_loop(0, chunks, chunk, 0)


def _backward_kernel(chunks, packed, *refs):
    s_ref, v_ref, M_ref, z_ref, delta_ref, do_ref, *begins_ref = refs[: 6 + packed]
    ds_ref, dv_ref, G_ref, R_ref, m_ref, G_state, R_state, m_state, begin_state = refs[6 + packed :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        G_state[...], R_state[...] = jnp.zeros_like(G_state), jnp.zeros_like(R_state)
        m_state[...] = jnp.full_like(m_state, jnp.inf)
        begin_state[...] = jnp.zeros_like(begin_state)

    def chunk(c, _):
        c = chunks - 1 - c
        at = pl.ds(pl.multiple_of(c * C, C), C)
        s, v, M, z = s_ref[0, at], v_ref[0, at], M_ref[0, at], z_ref[0, at]
        begins = _begins(begins_ref, c, s_ref.shape[2]) if packed else None
        over_z = 1 / jnp.where(z > 0, z, 1)
        a = exp_below(M, _shifted(M, -1, m_state[...]))
        a = a if begins is None else jnp.where(_shifted(begins, -1, begin_state[...]) > 0, 0, a)
        A, (G, R) = _recurrence(a, (do_ref[0, at] * over_z, delta_ref[0, at] * over_z), -1)
        G, R = G + A * G_state[...], R + A * R_state[...]
        w = exp_below(s, M)
        dv = w * G
        dv_ref[0, at], ds_ref[0, at] = dv, dv * v - w * R
        G_state[...], R_state[...], m_state[...] = G[:1], R[:1], M[:1]
        if packed:
            begin_state[...] = begins[:1]
        return 0

    jax.lax.fori_loop(0, chunks, chunk, 0)
    G_ref[0], R_ref[0], m_ref[0] = G_state[...], R_state[...], m_state[...]


def _running_maximum(s, begins):
    """max over l <= i of i's document in the chunk, and whether any document began there (None without documents)."""
    M, since = s, begins
    for d in _distances():
        before = jnp.maximum(M, _shifted(M, d, -jnp.inf))
        M = before if since is None else jnp.where(since > 0, M, before)
        since = None if since is None else jnp.maximum(since, _shifted(since, d, 0.0))
    return M, since


def _recurrence(a, x, sign):
    """x_i = a_i x_{i-1} + x_i from zero for each of x, and the products of a so far; from the end if sign is -1."""
    for d in _distances():
        x = tuple(each + a * _shifted(each, sign * d, 0.0) for each in x)
        a = a * _shifted(a, sign * d, 1.0)
    return a, x


def _distances():
    return [1 << n for n in range(C.bit_length() - 1)]


def _shifted(x, d, fill):
    """Row i becomes row i - d; the rows without one become `fill`."""
    at = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    outside = at < d if d > 0 else at >= C + d
    return jnp.where(outside, fill, pltpu.roll(x, d % C, 0))


def _begins(begins_ref, c, lanes):
    """1 where a document begins, [C, lanes]: the row of numbers turned into a column, exactly."""
    numbers = begins_ref[0][0, 0, pl.ds(c, 1)]  # [1, C]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    return jnp.broadcast_to(jnp.where(i == j, numbers, 0).sum(1, keepdims=True), (C, lanes))


def _specs(rows, lanes, time):
    """Blocks of [B, S, H] at the block of time `time(t)`, and of [B, 1, H]."""
    block = pl.BlockSpec((1, rows, lanes), lambda b, h, t: (b, time(t), h))
    return block, pl.BlockSpec((1, 1, lanes), lambda b, h, t: (b, 0, h))


def _begins_specs(begins, rows, time):
    """begins [B, S / rows, rows / C, C]: a chunk a row."""
    if begins is None:
        return []
    return [pl.BlockSpec((1, 1, rows // C, C), lambda b, h, t: (b, time(t), 0, 0))]
