"""Prefix softmax on TPU: a sweep over blocks of positions that carries its state in VMEM, and one back for gradients.

Letters: B batch, S positions, H logit heads, K value heads, Dv value size; a grid step takes R positions of one head,
in chunks of C. Where every channel is a head (Dv = 1) `channels_tpu.py` has them side by side instead.

    s, M, z, delta [B, H, 1, S]     v [B, K, S, Dv]     o, do, dv [B, H, S, Dv]     runs [B, 1, S]

Without causality there is nothing to carry: a document is one sum, which XLA takes as well as a kernel would.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas
from kernels.prefix_softmax import weights
from kernels.prefix_softmax.arguments import Arguments, empty_state, exp_difference
from kernels.prefix_softmax.blockwise import pooled
from kernels.prefix_softmax.channels_tpu import channels
from kernels.prefix_softmax.weights import Runs, exp_below, only

C = 128
ROWS = 512  # of a grid step, at most


def tpu(arguments: Arguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    """o [B, S, H, Dv], m [B, S, H] and z [B, S, H] in float32; o = 0 where z = 0."""
    a, (B, _, H) = arguments, arguments.s.shape
    if not a.causal:
        return pooled(a)
    state = (a.m, a.z, a.n) if a.m is not None else empty_state(B, H, a.v.shape[3])
    run = channels if a.v.shape[3] == 1 else heads
    return run(pallas.interpret(), block_rows(a), a.s, a.v, tuple(state), a.runs)


def why_unsupported(arguments: Arguments) -> str | None:
    """The kernels compute in float32."""
    if arguments.s.dtype == jnp.float64:
        return "float64 is not a TPU's; cast s and v to float32, or use 'blockwise'"
    return None


def block_rows(a: Arguments) -> int:
    """Positions of a grid step, a multiple of C: as few steps of at most ROWS as possible, with the least padding."""
    S = a.s.shape[1]
    steps = math.ceil(S / (a.chunk_size if a.chunk_given else ROWS))
    return C * math.ceil(S / (C * steps))


def heads(interpret, rows, s, v, state, runs):
    """The result of `tpu` for heads of Dv channels."""
    S = s.shape[1]
    s, v = padded(s.swapaxes(1, 2), 2, rows, -jnp.inf), padded(v.swapaxes(1, 2), 2, rows, 0)
    runs = None if runs is None else padded(runs, 1, rows, "edge")
    o, M, z = _attend(interpret, rows, s, v, state, runs)
    return o[:, :, :S].swapaxes(1, 2), M[:, :, :S].swapaxes(1, 2), z[:, :, :S].swapaxes(1, 2)


def padded(x, axis, size, fill):
    """`axis` padded to a multiple of `size`, with `fill` or ("edge") its last entry."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, padding, mode="edge") if fill == "edge" else jnp.pad(x, padding, constant_values=fill)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(interpret, rows, s, v, state, runs):
    return _forward(interpret, rows, s, v, state, runs)[0]


def _forward(interpret, rows, s, v, state, runs):
    """s [B, H, S], v [B, K, S, Dv], runs [B, S] or None, S a multiple of rows: o [B, H, S, Dv], M and z [B, H, S]."""
    (B, H, S), (K, Dv) = s.shape, (v.shape[1], v.shape[3])
    m, z, n = state
    line, block, kv = _specs(rows, H // K, Dv, lambda t: t)
    begin = pl.BlockSpec((1, 1, 1, 1), lambda b, h, t: (b, h, 0, 0))
    value = jax.ShapeDtypeStruct((B, H, S, Dv), jnp.float32)
    number = jax.ShapeDtypeStruct((B, H, 1, S), jnp.float32)
    o, M, z_rows = pl.pallas_call(
        partial(_forward_kernel, rows // C, runs is not None),
        grid=(B, H, S // rows),
        in_specs=[line, kv, begin, begin, pl.BlockSpec((1, 1, 1, Dv), lambda b, h, t: (b, h, 0, 0)),
                  *_runs_specs(runs, rows, lambda t: t)],
        out_specs=[block, line, line],
        out_shape=[value, number, number],
        scratch_shapes=[_number(), _number(), pltpu.VMEM((1, Dv), jnp.float32), _number()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(B * H * S, Dv, v.dtype.itemsize, 1),
        interpret=interpret,
        name="prefix_softmax_forward",
    )(s[:, :, None], v, m[:, :, None, None], z[:, :, None, None], n[:, :, None], *_runs_operand(runs))  # fmt: skip
    out = (o, M[:, :, 0], z_rows[:, :, 0])
    return out, (s, v, state, runs, *out)


def _backward(interpret, rows, residuals, cotangents):
    s, v, state, runs, o, M, z = residuals
    do, _, dz = cotangents
    (B, H, S), (K, Dv), last = s.shape, (v.shape[1], v.shape[3]), s.shape[2] // rows - 1
    delta = (do * o).sum(-1) - z * dz
    line, block, kv = _specs(rows, H // K, Dv, lambda t: last - t)
    end = pl.BlockSpec((1, 1, 1, 1), lambda b, h, t: (b, h, 0, 0))
    number = jax.ShapeDtypeStruct((B, H, 1, 1), jnp.float32)
    ds, dv, G, R, ref = pl.pallas_call(
        partial(_backward_kernel, rows // C, runs is not None),
        grid=(B, H, S // rows),
        in_specs=[line, kv, line, line, line, block, *_runs_specs(runs, rows, lambda t: last - t)],
        out_specs=[line, block, pl.BlockSpec((1, 1, 1, Dv), lambda b, h, t: (b, h, 0, 0)), end, end],
        out_shape=[jax.ShapeDtypeStruct((B, H, 1, S), jnp.float32), jax.ShapeDtypeStruct(do.shape, jnp.float32),
                   jax.ShapeDtypeStruct((B, H, 1, Dv), jnp.float32), number, number],
        scratch_shapes=[pltpu.VMEM((1, Dv), jnp.float32), _number(), _number(), _number()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(B * H * S, Dv, v.dtype.itemsize, 2),
        interpret=interpret,
        name="prefix_softmax_backward",
    )(*(x[:, :, None] for x in (s,)), v, *(x[:, :, None] for x in (M, z, delta)), do.astype(v.dtype),
      *_runs_operand(runs))  # fmt: skip
    dv = dv.reshape(B, K, H // K, S, Dv).sum(2).astype(v.dtype)
    return ds[:, :, 0], dv, state_gradient(state, G[:, :, 0], R[:, :, 0, 0], ref[:, :, 0, 0]), None


_attend.defvjp(_forward, _backward)


def state_gradient(state, G, R, ref):
    """Gradients of (m, z, n) from the sums over all rows that read them, scaled to ref; m is a constant."""
    f = exp_difference(state[0], ref)
    return jnp.zeros_like(state[0]), -f * R, f[..., None] * G


def _forward_kernel(chunks, packed, *refs):
    s_ref, v_ref, m0_ref, z0_ref, n0_ref, *runs_ref = refs[: 5 + packed]
    o_ref, M_ref, z_ref, m_state, z_state, n_state, run_state = refs[5 + packed :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        m_state[...], z_state[...], n_state[...] = m0_ref[0, 0], z0_ref[0, 0], n0_ref[0, 0]
        if packed:
            run_state[...] = _as_number(runs_ref[0][0, :, :1])

    m, z, n, run = m_state[...], z_state[...], n_state[...], run_state[...] if packed else None
    for c in range(chunks):
        at = pl.ds(c * C, C)
        runs, first, last = _runs_of(runs_ref[0][0, :, at] if packed else None, run)
        o, M, z_rows = weights.read(_dot, s_ref[0, 0, :, at], v_ref[0, 0, at], runs, m, z, n)
        o_ref[0, 0, at], M_ref[0, 0, :, at], z_ref[0, 0, :, at] = o, _turn(M), _turn(z_rows)
        m, z, run = M[C - 1 :], z_rows[C - 1 :], last
        n = o[C - 1 :] * z
    m_state[...], z_state[...], n_state[...] = m, z, n
    if packed:
        run_state[...] = run


def _backward_kernel(chunks, packed, *refs):
    s_ref, v_ref, M_ref, z_ref, delta_ref, do_ref, *runs_ref = refs[: 6 + packed]
    ds_ref, dv_ref, G_ref, R_ref, ref_ref, G_state, R_state, ref_state, run_state = refs[6 + packed :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        G_state[...], R_state[...] = jnp.zeros_like(G_state), jnp.zeros_like(R_state)
        ref_state[...] = jnp.full_like(ref_state, jnp.inf)
        if packed:
            run_state[...] = jnp.full_like(run_state, -1)

    G, R, ref, run = G_state[...], R_state[...], ref_state[...], run_state[...] if packed else None
    for c in reversed(range(chunks)):
        at = pl.ds(c * C, C)
        s, v, do = s_ref[0, 0, :, at], v_ref[0, 0, at], do_ref[0, 0, at]
        M, z, delta = (_turn(x[0, 0, :, at]) for x in (M_ref, z_ref, delta_ref))
        runs, first_run, last_run = _runs_of(runs_ref[0][0, :, at] if packed else None, None)
        first, last = M[:1], M[C - 1 :]
        f = exp_below(last if run is None else only(last_run == run, last), ref)
        G, R = f * G, f * R
        ds_ref[0, 0, :, at], dv_ref[0, 0, at] = weights.pull(
            _dot, _turn, s, v, runs, M, z, delta, do, last, G, R
        )
        u = exp_below(only(runs.start, jnp.broadcast_to(first, M.shape)), M) / jnp.where(z > 0, z, 1)
        through = exp_below(first if run is None else only(first_run == last_run, first), last)
        G = through * G + (u * do.astype(jnp.float32)).sum(0, keepdims=True)
        R = through * R + (u * delta).sum(0, keepdims=True)
        ref, run = first, first_run
    G_state[...], R_state[...], ref_state[...] = G, R, ref
    G_ref[0, 0], R_ref[0, 0], ref_ref[0, 0] = G, R, ref
    if packed:
        run_state[...] = run


def _runs_of(numbers, state_run):
    """What documents [1, C] allow, and the first and last of them [1, 1], as float32 (whole numbers, exactly)."""
    if numbers is None:
        return Runs(weights.triangle(C)), None, None
    numbers = _as_number(numbers)
    rows, first, last = _turn(numbers), numbers[:, :1], numbers[:, C - 1 :]
    carried = None if state_run is None else rows == state_run
    return Runs(weights.triangle(C) & (rows == numbers), carried, rows == first, numbers == last), first, last


def _as_number(runs):
    return runs.astype(jnp.float32)


def _turn(x):
    """[1, C] to [C, 1] or back, exactly: one entry of each sum is not zero."""
    line = weights.triangle(C) & ~(_strictly_below())
    return jnp.where(line, x, 0).sum(1 if x.shape[0] == 1 else 0, keepdims=True)


def _strictly_below():
    return jax.lax.broadcasted_iota(jnp.int32, (C, C), 0) > jax.lax.broadcasted_iota(jnp.int32, (C, C), 1)


def _dot(x, y, contracted):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _number():
    return pltpu.VMEM((1, 1), jnp.float32)


def _specs(rows, G, Dv, time):
    """Blocks of [B, H, 1, S], of [B, H, S, Dv] and of [B, K, S, Dv] at the block of time `time(t)`."""
    line = pl.BlockSpec((1, 1, 1, rows), lambda b, h, t: (b, h, 0, time(t)))
    block = pl.BlockSpec((1, 1, rows, Dv), lambda b, h, t: (b, h, time(t), 0))
    return line, block, pl.BlockSpec((1, 1, rows, Dv), lambda b, h, t: (b, jax.lax.div(h, G), time(t), 0))


def _runs_specs(runs, rows, time):
    return [] if runs is None else [pl.BlockSpec((1, 1, rows), lambda b, h, t: (b, 0, time(t)))]


def _runs_operand(runs):
    return [] if runs is None else [runs[:, None]]


def _cost(positions, Dv, itemsize, products):
    return pl.CostEstimate(
        flops=2 * products * C * Dv * positions,
        transcendentals=C * positions,
        bytes_accessed=positions * products * (Dv * (itemsize + 4) + 12),
    )
