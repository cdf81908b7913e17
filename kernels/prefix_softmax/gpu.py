"""Prefix softmax on GPU (Pallas-Triton): chunks in parallel, joined by a scan over their sums.

Letters: B batch, S positions, H logit heads, K value heads, G = H / K, Dv value size; N chunks of C positions. Where
every channel is a head (Dv = 1), `channels_gpu.py` has a thread walk along each channel instead.

1. what each chunk comes to (XLA: one reduction), 2. the states before each chunk by an associative scan, [B, N, H, Dv],
3. the rows of each chunk (kernel). The gradient has the same three steps in reverse.

Without causality there is nothing to carry: a document is one sum, which XLA takes as well as a kernel would.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import pallas
from kernels.prefix_softmax import weights
from kernels.prefix_softmax.arguments import Arguments, empty_state, exp_difference
from kernels.prefix_softmax.blockwise import pooled
from kernels.prefix_softmax.channels_gpu import channels
from kernels.prefix_softmax.summaries import Sums, states_before, sums_after, sums_from
from kernels.prefix_softmax.weights import Runs

ROWS, WIDE_ROWS = 64, 32  # of a chunk; of one of float32 values, whose products fill more registers
WIDE_SLICE = 16  # channels of float32 values that a product takes at once, likewise


def gpu(arguments: Arguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    """o [B, S, H, Dv], m [B, S, H] and z [B, S, H] in float32; o = 0 where z = 0."""
    a, (B, S, H), Dv = arguments, arguments.s.shape, arguments.v.shape[3]
    if not a.causal:
        return pooled(a)
    C = min(128, pl.next_power_of_2(max(16, a.chunk_size))) if a.chunk_given else rows_of(a.v)
    state = tuple((a.m, a.z, a.n) if a.m is not None else empty_state(B, H, Dv))
    runs = None if a.runs is None else jnp.pad(a.runs, ((0, 0), (0, -S % C)), mode="edge")
    rows = [(0, 0), (0, -S % C), (0, 0)]
    s = jnp.pad(a.s, rows, constant_values=-jnp.inf)
    if Dv == 1:
        v = jnp.repeat(a.v[..., 0], H // a.v.shape[2], axis=2).astype(jnp.float32)
        o, M, z = channels(pallas.interpret(), C, s, jnp.pad(v, rows), state, runs)
        return o[:, :S, :, None], M[:, :S], z[:, :S]
    wide = max(16, pl.next_power_of_2(Dv)) - Dv  # dimensions of a tile are powers of two
    v = jnp.pad(a.v, [*rows, (0, wide)])
    state = (*state[:2], jnp.pad(state[2], ((0, 0), (0, 0), (0, wide))))
    o, M, z = _attend(pallas.interpret(), C, s.swapaxes(1, 2), v.swapaxes(1, 2), state, runs)
    return tuple(x[:, :, :S].swapaxes(1, 2) for x in (o[..., :Dv], M, z))


def rows_of(v):
    return WIDE_ROWS if v.dtype == jnp.float32 else ROWS


def why_unsupported(arguments: Arguments) -> str | None:
    """The kernels compute in float32, and a tile of the values must fit the registers."""
    if arguments.s.dtype == jnp.float64:
        return "it sums in float32, and s or v is float64; cast them to float32, or use 'blockwise'"
    if arguments.v.shape[3] > 256:
        return (
            f"value size {arguments.v.shape[3]} is above 256; divide it over more heads, or use 'blockwise'"
        )
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(interpret, C, s, v, state, runs):
    return _forward(interpret, C, s, v, state, runs)[0]


def _forward(interpret, C, s, v, state, runs):
    """s [B, H, S], v [B, K, S, Dv], runs [B, S] or None, S a multiple of C: o [B, H, S, Dv], M and z [B, H, S]."""
    (B, H, S), (K, Dv) = s.shape, (v.shape[1], v.shape[3])
    initial, ends, _ = _initial(state, runs, S // C, C)
    before = states_before(_keys(s, v, runs, ends, C), initial)
    line, block, kv, number, vector, run = _specs(C, H // K, Dv)
    rows = jax.ShapeDtypeStruct((B, H, S), jnp.float32)
    packed = [] if runs is None else [runs, before.run[..., 0]]
    out = pl.pallas_call(
        partial(_forward_kernel, partial(_dot, interpret)),
        grid=(S // C, H, B),
        in_specs=[line, kv, number, number, vector, *([] if runs is None else [run, _of_chunk()])],
        out_specs=[block, line, line],
        out_shape=[jax.ShapeDtypeStruct((B, H, S, Dv), jnp.float32), rows, rows],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        cost_estimate=_cost(B * H * S, C, Dv, v.dtype.itemsize, 1),
        interpret=interpret,
        name="prefix_softmax_forward",
    )(s, v, before.m, before.z, before.n, *packed)
    return tuple(out), (s, v, state, runs, *out)


def _backward(interpret, C, residuals, cotangents):
    s, v, state, runs, o, M, z = residuals
    do, _, dz = cotangents
    (B, H, S), (K, Dv) = s.shape, (v.shape[1], v.shape[3])
    delta = (do * o).sum(-1) - z * dz
    _, ends, first = _initial(state, runs, S // C, C)
    of_all = sums_from(_rows(M, z, delta, do, runs, first, C))
    last = _chunked(M, 2, C)[..., -1].swapaxes(1, 2)
    G, R = sums_after(of_all, last, ends)
    line, block, kv, number, vector, run = _specs(C, H // K, Dv)
    ds, dv = pl.pallas_call(
        partial(_backward_kernel, partial(_dot, interpret)),
        grid=(S // C, H, B),
        in_specs=[line, kv, line, line, line, block, number, vector, number,
                  *([] if runs is None else [run, _of_chunk()])],
        out_specs=[line, block],
        out_shape=[jax.ShapeDtypeStruct(s.shape, jnp.float32), jax.ShapeDtypeStruct(do.shape, jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4 if Dv <= 64 and C <= ROWS else 8, num_stages=1),
        cost_estimate=_cost(B * H * S, C, Dv, v.dtype.itemsize, 2),
        interpret=interpret,
        name="prefix_softmax_backward",
    )(s, v, M, z, delta, do.astype(v.dtype), last, G, R, *([] if runs is None else [runs, ends[..., 0]]))  # fmt: skip
    dv = dv.reshape(B, K, H // K, S, Dv).sum(2).astype(v.dtype)
    f = exp_difference(state[0], of_all.m[:, 0])
    return ds, dv, (jnp.zeros_like(f), -f * of_all.z[:, 0], f[..., None] * of_all.n[:, 0]), None


_attend.defvjp(_forward, _backward)


def _forward_kernel(dot, s_ref, v_ref, m_ref, z_ref, n_ref, *refs):
    *runs_refs, o_ref, M_ref, z_out_ref = refs
    C = s_ref.shape[0]
    visible, carried = weights.triangle(C), None
    if runs_refs:
        runs, state_run = runs_refs[0][...], runs_refs[1][...]
        visible = visible & (runs[:, None] == runs[None])
        carried = (runs == state_run)[:, None]
    m, z = m_ref[...], z_ref[...]
    m = jnp.broadcast_to(m, (C, 1))  # a scalar takes no part in a reduction's layout
    o, M, z = weights.read(dot, s_ref[...][None], v_ref[...], Runs(visible, carried), m, z, n_ref[...][None])
    o_ref[...], M_ref[...], z_out_ref[...] = o, M.reshape(C), z.reshape(C)


def _backward_kernel(dot, s_ref, v_ref, M_ref, z_ref, delta_ref, do_ref, last_ref, G_ref, R_ref, *refs):
    *runs_refs, ds_ref, dv_ref = refs
    C = s_ref.shape[0]
    visible, end = weights.triangle(C), None
    if runs_refs:
        runs, last_run = runs_refs[0][...], runs_refs[1][...]
        visible, end = visible & (runs[:, None] == runs[None]), (runs == last_run)[None]
    M, z, delta = (x[...][:, None] for x in (M_ref, z_ref, delta_ref))
    Dv = v_ref.shape[1]
    step = min(Dv, WIDE_SLICE if v_ref.dtype == jnp.float32 else Dv)

    def of_slice(n, ds):
        """What a slice of the channels brings; of delta and R, which are of all channels, each brings a part."""
        at, part = pl.ds(n * step, step), step / Dv  # a power of two, which leaves all digits
        more, dv_ref[:, at] = weights.pull(
            dot, lambda x: x.reshape(x.shape[::-1]), s_ref[...][None], v_ref[:, at], Runs(visible, end=end), M, z,
            delta * part, do_ref[:, at], last_ref[...], G_ref[at][None], R_ref[...] * part,
        )  # fmt: skip
        return ds + more

    ds_ref[...] = jax.lax.fori_loop(0, Dv // step, of_slice, jnp.zeros((1, C), jnp.float32)).reshape(C)


def _keys(s, v, runs, ends, C) -> Sums:
    """What the keys of each chunk's last document come to."""
    s, v, groups = _chunked(s, 2, C), _chunked(v, 2, C), s.shape[1] // v.shape[1]
    if runs is not None:
        s = jnp.where((_chunked(runs, 1, C) == ends)[:, None], s, -jnp.inf)
    m = s.max(-1)
    w = exp_difference(s, m[..., None])
    grouped = w.reshape(s.shape[0], v.shape[1], groups, *s.shape[2:])
    n = _einsum("bkgnc,bkncd->bnkgd", grouped, v.astype(jnp.float32))
    return Sums(m.swapaxes(1, 2), w.sum(-1).swapaxes(1, 2), n.reshape(*n.shape[:2], -1, n.shape[4]), ends)


def _rows(M, z, delta, do, runs, first, C) -> Sums:
    """What the rows of each chunk's first document come to."""
    M, z, delta, do = (_chunked(x, 2, C) for x in (M, z, delta, do))
    u = exp_difference(M[..., :1], M) / jnp.where(z > 0, z, 1)
    if runs is not None:
        u = jnp.where((_chunked(runs, 1, C) == first)[:, None], u, 0)
    G, R = _einsum("bhnc,bhncd->bnhd", u, do), (u * delta).sum(-1)
    return Sums(M[..., 0].swapaxes(1, 2), R.swapaxes(1, 2), G, first)


def _initial(state, runs, N, C):
    """The state as the first entry of a scan; the last and the first document of each chunk [B, N, 1]."""
    m, z, n = (x[:, None] for x in state)
    if runs is None:
        one = jnp.zeros((len(m), N, 1), jnp.int32)
        return Sums(m, z, n, one[:, :1]), one, one
    chunks = _chunked(runs, 1, C)
    return Sums(m, z, n, runs[:, :1, None]), chunks[..., -1:], chunks[..., :1]


def _chunked(x, axis, C):
    return x.reshape(*x.shape[:axis], -1, C, *x.shape[axis + 1 :])


_einsum = partial(jnp.einsum, precision="highest")


def _dot(interpret, x, y, contracted):
    """float32 products take three TensorFloat-32 ones, which keep its digits; the simulator has them exactly."""
    precision = None
    if x.dtype == jnp.float32:
        X3 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = jax.lax.Precision.HIGHEST if interpret else X3
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _specs(C, G, Dv):
    """Blocks of [B, H, S], [B, H, S, Dv], [B, K, S, Dv], [B, N, H], [B, N, H, Dv] and [B, S]; grid (N, H, B)."""
    line = pl.BlockSpec((None, None, C), lambda t, h, b: (b, h, t))
    block = pl.BlockSpec((None, None, C, Dv), lambda t, h, b: (b, h, t, 0))
    kv = pl.BlockSpec((None, None, C, Dv), lambda t, h, b: (b, jax.lax.div(h, G), t, 0))
    number = pl.BlockSpec((None, None, None), lambda t, h, b: (b, t, h))
    vector = pl.BlockSpec((None, None, None, Dv), lambda t, h, b: (b, t, h, 0))
    return line, block, kv, number, vector, pl.BlockSpec((None, C), lambda t, h, b: (b, t))


def _of_chunk():
    """One number of [B, N]."""
    return pl.BlockSpec((None, None), lambda t, h, b: (b, t))


def _cost(positions, C, Dv, itemsize, products):
    return pl.CostEstimate(
        flops=2 * products * C * Dv * positions,
        transcendentals=C * positions,
        bytes_accessed=positions * products * (Dv * (itemsize + 4) + 12),
    )
