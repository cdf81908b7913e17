"""Slot attention in blocks of rows, pure JAX: memory linear in T, gradients from a recomputed scan.

Letters: B batch, T rows (queries), S keys, H query heads, K key/value heads, G = H / K, D, Dv head sizes, M slots; C
rows of a block; i, j rows of one block, m a slot. Primes mark tokens as they enter the slots, delayed by the shift.

    b_im  = sum of g'_lm over l <= i, since the block or the document began
    E_ijm = exp(sum of g'_lm over j < l <= i) s'_jm                              s' = 1 - exp(g')
    u_i   = scale (exp(b_i) * (K q_i) + sum_j (q_i . k'_j) E_ij)                 K, V: the state at the block's start
    o_i   = V^T (exp(b_i) * p_i) + sum_j (sum_m p_im E_ijm) v'_j                 p = softmax(u)
    K    <- exp(b_C) * K + sum_j E_Cj k'_j,    V likewise

All exponents are sums of log gates, never differences or negatives of sums: nothing overflows, and no digit is lost
however strong the gates. One scan over blocks carries both states; it is nested in chunks whose insides are recomputed
in the backward pass. The window is ordinary windowed softmax attention, so the streaming kernel computes it, and both
parts are merged by their log-sum-exps, which is exactly the one joint softmax.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from kernels.forgetting import BlockSizes, forgetting_attention
from kernels.slots.arguments import Arguments, SlotState
from kernels.slots.rows import delay, find_rows
from kernels.streaming.merge import merge


def blockwise(arguments: Arguments) -> tuple[jax.Array, jax.Array, jax.Array, SlotState]:
    """o [B, T, H, Dv] in q's dtype; lse of the slots and of the window, both [B, T, H]; the last row's state."""
    return joined_with_window(arguments, *slots(arguments))


def joined_with_window(arguments: Arguments, o, lse, state, implementation: str | None = None):
    """The result of `blockwise` from that of the slots; the window is computed by `implementation`."""
    if not arguments.window:
        return o.astype(arguments.q.dtype), lse, jnp.full_like(lse, -jnp.inf), state
    of_window, lse_window = window(arguments, implementation)
    o, _ = merge(o, lse, of_window, lse_window)
    return o.astype(arguments.q.dtype), lse, lse_window, state


def window(arguments: Arguments, implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Softmax over the window alone: o [B, T, H, Dv] in q's dtype and lse [B, T, H]."""
    T, S = arguments.q.shape[1], arguments.k.shape[1]
    size = min(arguments.window, S)
    # Blocks wider than a short window would compute mostly invisible pairs.
    sizes = BlockSizes(64, 64) if size <= 64 < T and implementation is None else None
    return forgetting_attention(
        arguments.q_window, arguments.k_window, arguments.v, block_sizes=sizes, return_lse=True,
        mask=dataclasses.replace(arguments.mask, window=size), scale=arguments.scale, implementation=implementation,
    )  # fmt: skip


def slots(arguments: Arguments) -> tuple[jax.Array, jax.Array, SlotState]:
    """Softmax over the slots alone: o [B, T, H, Dv] and lse [B, T, H] in the accumulation dtype; the last state."""
    (B, T, H, _), K, sizes = arguments.q.shape, arguments.k.shape[2], arguments.chunk_sizes
    rows = find_rows(arguments)
    # Past the end nothing enters and nothing begins, so the state stays.
    q = _split(arguments.q.reshape(B, T, K, H // K, -1), sizes)
    delayed = (_split(delay(x, arguments), sizes) for x in (arguments.k, arguments.v, arguments.log_gates))
    heads = [jnp.moveaxis(q, 3, 5), *(jnp.moveaxis(x, 3, 4) for x in delayed)]
    flags = [_split(x, sizes) for x in (rows.enters, rows.begins, rows.shown)]
    start = (arguments.state.key, arguments.state.value)
    step = partial(_block, arguments.scale, start if arguments.document_state == "initial" else None)

    def chunk(state, blocks):
        return jax.lax.scan(step, state, blocks)

    if q.shape[0] > 1:  # one chunk would be recomputed for nothing
        chunk = jax.checkpoint(chunk, prevent_cse=False)
    (key, value), (o, lse) = jax.lax.scan(chunk, start, (*heads, *flags))
    return _join(o, T), _join(lse[..., None], T)[..., 0], SlotState(key, value, rows.written[:, -1])


def _block(scale, start, state, inputs):
    """One block of C rows. q [B, K, G, C, D], k [B, K, C, D], v [B, K, C, Dv], gates [B, K, C, M]; flags [B, C].

    Returns the state after the block, and o [B, K, G, C, Dv] and lse [B, K, G, C].
    """
    q, k, v, log_gates, enters, begins, shown = inputs
    (key, value), accumulator = state, log_gates.dtype
    q, k, v = q.astype(accumulator), k.astype(accumulator), v.astype(accumulator)
    log_gates = jnp.where(enters[:, None, :, None], log_gates, 0)
    write = -jnp.expm1(log_gates)  # zero where nothing enters; expm1 is exact for slow gates
    run = jnp.cumsum(begins, axis=1)
    decay, since = _decays(log_gates, run)
    kernel = since * write[:, :, None]  # E [B, K, C, C, M]
    carried = (run == 0)[:, None, None, :, None]  # rows still of the document the state belongs to

    read = _einsum("bkmd,bkgid->bkgim", key, q)
    read = jnp.where(carried, read, 0 if start is None else _einsum("bkmd,bkgid->bkgim", start[0], q))
    scores = _einsum("bkgid,bkjd->bkgij", q, k)
    u = scale * (decay[:, :, None] * read + _einsum("bkgij,bkijm->bkgim", scores, kernel))
    p, lse = softmax_of_slots(u, shown[:, None, None])

    of_state = p * decay[:, :, None]
    o = _einsum("bkgim,bkmv->bkgiv", jnp.where(carried, of_state, 0), value)
    if start is not None:
        o = o + _einsum("bkgim,bkmv->bkgiv", jnp.where(carried, 0, of_state), start[1])
    o = o + _einsum("bkgij,bkjv->bkgiv", _einsum("bkgim,bkijm->bkgij", p, kernel), v)

    def advance(old, restart, new):
        old = jnp.where(carried[:, :, 0, -1, None], old, 0 if restart is None else restart)
        return decay[:, :, -1, :, None] * old + _einsum("bkjm,bkjd->bkmd", kernel[:, :, -1], new)

    starts = (None, None) if start is None else start
    return (advance(key, starts[0], k), advance(value, starts[1], v)), (o, lse)


def _decays(log_gates, run):
    """exp of sums of log gates: over l <= i in i's run [B, K, C, M]; over j < l <= i, 0 across runs [B, K, C, C, M]."""
    C = log_gates.shape[2]
    i = jnp.arange(C)
    same = (run[:, :, None] == run[:, None, :]) & (i[:, None] >= i)  # [B, C, C]
    decay = jnp.exp(_einsum("bil,bklm->bkim", same.astype(log_gates.dtype), log_gates))
    between = (i[:, None, None] >= i) & (i[:, None] < i)  # [i, j, l]: j < l <= i
    sums = _einsum("ijl,bklm->bkijm", between.astype(log_gates.dtype), log_gates)
    return decay, jnp.exp(jnp.where(same[:, None, :, :, None], sums, -jnp.inf))


def softmax_of_slots(u, shown):
    """Softmax and log-sum-exp over the slots; zeros and -inf in rows whose slots do not show."""
    highest = jax.lax.stop_gradient(u.max(-1, keepdims=True))
    weights = jnp.exp(u - highest)
    Z = weights.sum(-1, keepdims=True)
    lse = (highest + jnp.log(Z))[..., 0]
    return jnp.where(shown[..., None], weights / Z, 0), jnp.where(shown, lse, -jnp.inf)


_einsum = partial(jnp.einsum, precision="highest")


def _split(x, sizes):
    """[B, T, ...] -> [chunks, blocks of a chunk, B, C, ...], zero-padded at the end."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % sizes.chunk)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, sizes.chunk // sizes.block, sizes.block, *x.shape[2:])
    return jnp.moveaxis(x, 0, 2)


def _join(x, T):
    """o [chunks, blocks, B, K, G, C, Dv] -> [B, T, H, Dv]."""
    x = jnp.moveaxis(x, (2, 5), (0, 3))  # [B, chunks, blocks, C, K, G, Dv]
    return x.reshape(x.shape[0], -1, x.shape[4] * x.shape[5], x.shape[6])[:, :T]
