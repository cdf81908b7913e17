"""Prefix softmax in chunks, pure JAX: O(S C Dv) time, memory linear in S, with its own backward pass.

Letters: B batch, S positions, H logit heads, K value heads, G = H / K, Dv value size; N chunks of C positions; i a row
and j a key of the chunk at hand. In a document the running maximum M_i never falls, so every exponent below is <= 0;
"same" stands for "of the same document".

    s, M, z [N, B, H, C]     v [N, B, K, C, Dv]     o [N, B, H, C, Dv]     runs [N, B, C]
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.prefix_softmax.arguments import Arguments, empty_state, exp_difference

einsum = partial(jnp.einsum, precision="highest")


def blockwise(arguments: Arguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    """o [B, S, H, Dv], m [B, S, H] and z [B, S, H] in the accumulation dtype; o = 0 where z = 0."""
    a, (B, S, H), Dv = arguments, arguments.s.shape, arguments.v.shape[3]
    if not a.causal:
        return pooled(a)
    state = (a.m, a.z, a.n) if a.m is not None else empty_state(B, H, Dv, a.s.dtype)
    s = _chunks(a.s.swapaxes(1, 2), 2, a.chunk_size, -jnp.inf)
    v = _chunks(a.v.astype(a.s.dtype).swapaxes(1, 2), 2, a.chunk_size, 0)
    runs = None if a.runs is None else _chunks(a.runs, 1, a.chunk_size, "edge")
    o, m, z = (_join(x)[:, :, :S].swapaxes(1, 2) for x in _attend(s, v, tuple(state), runs))
    return o, m, z


def _chunks(x, axis, size, fill):
    """Axis `axis` padded to a multiple of `size` and cut; the chunk number leads."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, padding, mode="edge") if fill == "edge" else jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x):
    """[N, B, H, C, ...] -> [B, H, N C, ...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


@jax.custom_vjp
def _attend(s, v, state, runs):
    return _forward(s, v, state, runs)[0]


def _forward(s, v, state, runs):
    def chunk(carry, x):
        (m, z, n, run), (s, v, runs) = carry, x
        before = m[..., None] if runs is None else _where((runs == run[:, None])[:, None], m[..., None])
        seen = jnp.where(_visible(s.shape[-1], runs), s[..., None, :], -jnp.inf)  # [B, H, i, j]
        M = jnp.maximum(seen.max(-1), before)
        w, a = exp_difference(seen, M[..., None]), exp_difference(before, M)
        z = a * z[..., None] + w.sum(-1)
        n = a[..., None] * n[:, :, None] + _weigh(w, v)
        o = n / jnp.where(z > 0, z, 1)[..., None]
        return (M[..., -1], z[..., -1], n[..., -1, :], None if runs is None else runs[:, -1]), (o, M, z)

    first = None if runs is None else runs[0, :, 0]
    _, out = jax.lax.scan(chunk, (*state, first), (s, v, runs))
    return out, (s, v, state, runs, *out)


def _backward(residuals, cotangents):
    """Chunks in reverse; later rows i act on the keys of a chunk through two sums over them, scaled by e^M_ref:

    G = sum e^(M_ref - M_i) / z_i do_i   and   R = sum e^(M_ref - M_i) / z_i delta_i,   M_ref of the first later row.

    M is a constant to gradients, so its cotangent does not enter; that of z acts like one of log z.
    """
    s, v, state, runs, o, M, z = residuals
    do, _, dz = cotangents

    def chunk(carry, x):
        (G, R, ref, run), (s, v, runs, o, M, z, do, dz) = carry, x
        over_z, delta = 1 / jnp.where(z > 0, z, 1), (do * o).sum(-1) - z * dz
        last, first = M[..., -1], M[..., 0]
        same = (lambda at, x: x) if runs is None else (lambda at, x: _where((runs == at)[:, None], x))
        end, start = (None, None) if runs is None else (runs[:, -1:], runs[:, :1])
        later = last if runs is None else _where(end == run[:, None], last)
        f = exp_difference(later, ref)
        G, R = f[..., None] * G, f * R
        seen = jnp.where(_visible(s.shape[-1], runs), s[..., None, :], -jnp.inf)
        p = exp_difference(seen, M[..., None]) * over_z[..., None]
        e = exp_difference(same(end, s), last[..., None])
        dv = einsum("bhij,bhid->bhjd", p, do) + e[..., None] * G[:, :, None]
        c = einsum("bhij,bhi->bhj", p, delta) + e * R[..., None]
        B, H, C, Dv = dv.shape
        grouped = dv.reshape(B, v.shape[1], -1, C, Dv)
        ds = (grouped * v[:, :, None]).sum(-1).reshape(B, H, C) - c
        u = exp_difference(same(start, jnp.broadcast_to(first[..., None], M.shape)), M) * over_z
        through = exp_difference(first if runs is None else _where(start == end, first), last)
        G = through[..., None] * G + einsum("bhi,bhid->bhd", u, do)
        R = through * R + (u * delta).sum(-1)
        return (G, R, first, None if runs is None else runs[:, 0]), (ds, grouped.sum(2))

    m0, z0, n0 = state
    none = None if runs is None else jnp.full_like(runs[0, :, 0], -1)
    carry = (jnp.zeros_like(n0), jnp.zeros_like(z0), jnp.full_like(m0, jnp.inf), none)
    (G, R, ref, _), (ds, dv) = jax.lax.scan(chunk, carry, (s, v, runs, o, M, z, do, dz), reverse=True)
    f = exp_difference(m0, ref)
    return ds, dv, (jnp.zeros_like(m0), -f * R, f[..., None] * G), None


_attend.defvjp(_forward, _backward)


def _where(condition, x):
    return jnp.where(condition, x, -jnp.inf)


def _visible(size, runs):
    """Keys j <= i of the same document, bool [B or 1, 1, i, j]."""
    seen = jnp.tril(jnp.ones((1, 1, size, size), bool))
    return seen if runs is None else seen & (runs[:, None, :, None] == runs[:, None, None, :])


def _weigh(w, v):
    """w [B, H, i, j] on v [B, K, j, Dv]: [B, H, i, Dv]."""
    (B, H, C, _), K = w.shape, v.shape[1]
    n = einsum("bkgij,bkjd->bkgid", w.reshape(B, K, H // K, C, C), v)
    return n.reshape(B, H, C, -1)


def pooled(a: Arguments):
    """Without causality every row of a document reads the same softmax: one sum a document, handed to its rows."""
    (B, S, H), groups = a.s.shape, a.s.shape[2] // a.v.shape[2]
    runs = jnp.zeros((B, S), jnp.int32) if a.runs is None else a.runs
    count = 1 if a.runs is None else S

    def row(s, v, runs):  # [S, H], [S, K, Dv], [S]
        m = jax.lax.stop_gradient(jax.ops.segment_max(s, runs, count))
        w = exp_difference(s, m[runs])
        weighted = (w.reshape(S, -1, groups, 1) * v[:, :, None]).reshape(S, H, -1)
        z, n = jax.ops.segment_sum(w, runs, count), jax.ops.segment_sum(weighted, runs, count)
        return (n / jnp.where(z > 0, z, 1)[..., None])[runs], m[runs], z[runs]

    return jax.vmap(row)(a.s, a.v.astype(a.s.dtype), runs)
