"""Prefix softmax on GPU where every channel is a head: a thread walks along each channel of a chunk.

Letters: B batch, S positions, H channels, N chunks of C positions, L channels a program. The recurrences are those of
`channels_tpu.py`, taken one position after the other; the states between chunks come from `summaries.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.prefix_softmax.arguments import exp_difference
from kernels.prefix_softmax.summaries import Sums, states_before, sums_after, sums_from
from kernels.prefix_softmax.weights import exp_below

CHANNELS = 128


def channels(interpret, C, s, v, state, runs):
    """o, M, z [B, S, H] of s, v [B, S, H], S a multiple of C; state m, z [B, H], n [B, H, 1]; runs [B, S] or None."""
    H = s.shape[2]
    wide = -H % min(CHANNELS, max(16, pl.next_power_of_2(H)))
    s = jnp.pad(s, ((0, 0), (0, 0), (0, wide)), constant_values=-jnp.inf)
    v = jnp.pad(v, ((0, 0), (0, 0), (0, wide)))
    m = jnp.pad(state[0], ((0, 0), (0, wide)), constant_values=-jnp.inf)
    z, n = (jnp.pad(x, ((0, 0), (0, wide))) for x in (state[1], state[2][..., 0]))
    return tuple(x[..., :H] for x in _attend(interpret, C, s, v, (m, z, n), runs))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(interpret, C, s, v, state, runs):
    return _forward(interpret, C, s, v, state, runs)[0]


def _forward(interpret, C, s, v, state, runs):
    B, S, H = s.shape
    ends, _, zero = _documents(runs, B, S // C, C)
    initial = Sums(state[0][:, None], state[1][:, None], state[2][:, None, :, None], zero)
    before = states_before(_keys(s, v, runs, ends, C), initial)
    block, one, column = _specs(C, min(CHANNELS, H))
    shape = jax.ShapeDtypeStruct(s.shape, jnp.float32)
    out = pl.pallas_call(
        _forward_kernel,
        grid=(S // C, H // min(CHANNELS, H), B),
        in_specs=[block, block, one, one, one, *([] if runs is None else [column])],
        out_specs=[block] * 3,
        out_shape=[shape] * 3,
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(CHANNELS, H) // 32), num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=12 * s.size, transcendentals=2 * s.size, bytes_accessed=20 * s.size
        ),
        interpret=interpret,
        name="prefix_softmax_channels_forward",
    )(s, v, before.m, before.z, before.n[..., 0], *_begins(runs, -1))
    return tuple(out), (s, v, state, runs, *out)


def _backward(interpret, C, residuals, cotangents):
    s, v, state, runs, o, M, z = residuals
    do, _, dz = cotangents
    B, S, H = s.shape
    delta = do * o - z * dz
    ends, first, _ = _documents(runs, B, S // C, C)
    of_all = sums_from(_rows(M, z, delta, do, runs, first, C))
    last = _chunked(M, C)[:, :, -1]
    G, R = sums_after(of_all, last, ends)
    block, one, column = _specs(C, min(CHANNELS, H))
    shape = jax.ShapeDtypeStruct(s.shape, jnp.float32)
    ds, dv = pl.pallas_call(
        _backward_kernel,
        grid=(S // C, H // min(CHANNELS, H), B),
        in_specs=[*[block] * 6, one, one, one, *([] if runs is None else [column])],
        out_specs=[block] * 2,
        out_shape=[shape] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(CHANNELS, H) // 32), num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=16 * s.size, transcendentals=2 * s.size, bytes_accessed=32 * s.size
        ),
        interpret=interpret,
        name="prefix_softmax_channels_backward",
    )(s, v, M, z, delta, do, last, G[..., 0], R, *_begins(runs, 1))
    f = exp_difference(state[0], of_all.m[:, 0])
    return ds, dv, (jnp.zeros_like(f), -f * of_all.z[:, 0], f * of_all.n[:, 0, :, 0]), None


_attend.defvjp(_forward, _backward)


def _forward_kernel(s_ref, v_ref, m_ref, z_ref, n_ref, *refs):
    *begins_ref, o_ref, M_ref, z_out_ref = refs

    def position(i, carry):
        m, z, n = carry
        s, v = s_ref[i], v_ref[i]
        if begins_ref:
            m = jnp.where(begins_ref[0][i] > 0, -jnp.inf, m)
        M = jnp.maximum(m, s)
        a, w = exp_below(m, M), exp_below(s, M)
        z, n = a * z + w, a * n + w * v
        o_ref[i], M_ref[i], z_out_ref[i] = n / jnp.where(z > 0, z, 1), M, z
        return M, z, n

    jax.lax.fori_loop(0, s_ref.shape[0], position, (m_ref[...], z_ref[...], n_ref[...]))


def _backward_kernel(s_ref, v_ref, M_ref, z_ref, delta_ref, do_ref, last_ref, G_ref, R_ref, *refs):
    *ends_ref, ds_ref, dv_ref = refs

    def position(step, carry):
        i = s_ref.shape[0] - 1 - step
        G, R, later = carry
        s, v, M, z = s_ref[i], v_ref[i], M_ref[i], z_ref[i]
        a, over_z = exp_below(M, later), 1 / jnp.where(z > 0, z, 1)
        if ends_ref:  # the last chunk's row was scaled to itself: nothing to drop there
            a = jnp.where((ends_ref[0][i] > 0) & (step > 0), 0, a)
        G, R = a * G + do_ref[i] * over_z, a * R + delta_ref[i] * over_z
        w = exp_below(s, M)
        dv = w * G
        dv_ref[i], ds_ref[i] = dv, dv * v - w * R
        return G, R, M

    jax.lax.fori_loop(0, s_ref.shape[0], position, (G_ref[...], R_ref[...], last_ref[...]))


def _keys(s, v, runs, ends, C) -> Sums:
    """What the keys of each chunk's last document come to."""
    s, v = _chunked(s, C), _chunked(v, C)
    if runs is not None:
        s = jnp.where((_chunked(runs, C) == ends)[..., None], s, -jnp.inf)
    m = s.max(2)
    w = exp_difference(s, m[:, :, None])
    return Sums(m, w.sum(2), (w * v).sum(2)[..., None], ends)


def _rows(M, z, delta, do, runs, first, C) -> Sums:
    """What the rows of each chunk's first document come to."""
    M, z, delta, do = (_chunked(x, C) for x in (M, z, delta, do))
    u = exp_difference(M[:, :, :1], M) / jnp.where(z > 0, z, 1)
    if runs is not None:
        u = jnp.where((_chunked(runs, C) == first)[..., None], u, 0)
    return Sums(M[:, :, 0], (u * delta).sum(2), (u * do).sum(2)[..., None], first)


def _documents(runs, B, N, C):
    """The last and the first document of each chunk [B, N, 1], and that of the state [B, 1, 1]."""
    if runs is None:
        one = jnp.zeros((B, N, 1), jnp.int32)
        return one, one, one[:, :1]
    chunks = _chunked(runs, C)
    return chunks[..., -1:], chunks[..., :1], runs[:, :1, None]


def _begins(runs, side):
    """int32 [B, S]: another document stands before (side -1) or behind (side 1) the position; nothing without runs."""
    if runs is None:
        return []
    changes = (runs[:, 1:] != runs[:, :-1]).astype(jnp.int32)
    return [jnp.pad(changes, ((0, 0), (1, 0) if side < 0 else (0, 1)))]


def _chunked(x, C):
    return x.reshape(x.shape[0], -1, C, *x.shape[2:])


def _specs(C, L):
    """Blocks of [B, S, H], [B, N, H] and [B, S]; grid (N, H / L, B)."""
    block = pl.BlockSpec((None, C, L), lambda t, h, b: (b, t, h))
    return (
        block,
        pl.BlockSpec((None, None, L), lambda t, h, b: (b, t, h)),
        pl.BlockSpec((None, C), lambda t, h, b: (b, t)),
    )
