"""Slot attention written as the paper's equations: a loop over time with one joint softmax a row. The definition.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D, Dv head sizes, M slots, W window,
n slot shift; t a query row at position a = q_offset + t, e = a - n the key that enters the slots with it.

    alpha_e = exp(log gates of e)
    K_t = alpha_e K_{t-1} + (1 - alpha_e) k_e^T      V_t = alpha_e V_{t-1} + (1 - alpha_e) v_e^T
    u_t = scale K_t q_t,   w_tj = scale q'_t . k'_j  (a - W < j <= a; primes: the window's own queries and keys)
    o_t = V_t^T softmax(u_t, w_t)[slots] + sum_j softmax(u_t, w_t)[j] v_j
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.slots.arguments import Arguments, SlotState


def reference(arguments: Arguments) -> tuple[jax.Array, jax.Array, jax.Array, SlotState]:
    """o [B, T, H, Dv] in q's dtype; lse of the slots and of the window, both [B, T, H]; the last row's state."""
    (B, T, H, D), K, mask = arguments.q.shape, arguments.k.shape[2], arguments.mask
    q = arguments.q.astype(arguments.accumulator).reshape(B, T, K, H // K, D)
    rows = jnp.ones((B, T), jnp.int32) if mask.q_segments is None else mask.q_segments
    if mask.starts is not None:
        rows = jnp.where(mask.q_offset + jnp.arange(T) >= mask.starts[:, None], rows, 0)
    inputs = (jnp.arange(T), q.swapaxes(0, 1), rows.T, jnp.moveaxis(_window_logits(arguments), 3, 0))
    before = (arguments.state, jnp.zeros(B, jnp.int32))
    (state, _), (o, lse_slots, lse_window) = jax.lax.scan(_row(arguments), before, inputs)
    o, lse_slots, lse_window = (jnp.moveaxis(x, 0, 1) for x in (o, lse_slots, lse_window))
    o = o.reshape(B, T, H, -1).astype(arguments.q.dtype)
    return o, lse_slots.reshape(B, T, H), lse_window.reshape(B, T, H), state


def _window_logits(arguments: Arguments) -> jax.Array:
    """w [B, K, G, T, S], -inf outside the window and where the mask hides the key."""
    accumulator, (B, T, H, D), K = arguments.accumulator, arguments.q_window.shape, arguments.k.shape[2]
    q, k = arguments.q_window.astype(accumulator), arguments.k_window.astype(accumulator)
    w = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, K, H // K, D), k, precision="highest")
    if not arguments.window:
        return jnp.full_like(w, -jnp.inf)
    seen = masks.dense(dataclasses.replace(arguments.mask, window=arguments.window), T, k.shape[1])
    return jnp.where(seen[:, None, None], arguments.scale * w, -jnp.inf)


def _row(arguments: Arguments):
    """The scan's body: one row updates the state, then reads slots and window."""
    mask, S, start = arguments.mask, arguments.k.shape[1], arguments.state
    k, v = arguments.k.astype(arguments.accumulator), arguments.v.astype(arguments.accumulator)

    def entering(e, document):
        """Key e, its value, gates, and whether it is a visible token of `document` [B]."""
        at = jnp.clip(e, 0, S - 1)
        of_key = jnp.ones_like(document) if mask.kv_segments is None else mask.kv_segments[:, at]
        enters = (e >= 0) & (document != 0) & (of_key == document)
        if mask.starts is not None:
            enters &= e >= mask.starts
        if mask.lengths is not None:
            enters &= e < mask.lengths
        return k[:, at], v[:, at], arguments.log_gates[:, at], enters

    def row(carry, inputs):
        (t, q, segment, w), (state, document) = inputs, carry
        begins = (segment != 0) & (document != 0) & (segment != document)  # padding between changes nothing
        if arguments.document_state == "initial":
            state = _select(begins, start, state)
        else:
            state = _select(begins, jax.tree.map(jnp.zeros_like, start), state)
        document = jnp.where(segment != 0, segment, document)
        k_e, v_e, log_gate, enters = entering(mask.q_offset + t - arguments.shift, document)
        log_gate = jnp.where(enters[:, None, None], log_gate, 0)[..., None]
        alpha, write = jnp.exp(log_gate), -jnp.expm1(log_gate)  # expm1: exact for slow gates
        state = SlotState(
            alpha * state.key + write * k_e[:, :, None],
            alpha * state.value + write * v_e[:, :, None],
            state.written | enters,
        )
        u = arguments.scale * jnp.einsum("bkmd,bkgd->bkgm", state.key, q, precision="highest")
        shown = segment != 0 if arguments.empty_slots == "sink" else (segment != 0) & state.written
        u = jnp.where(shown[:, None, None, None], u, -jnp.inf)
        probabilities = _softmax(jnp.concatenate([u, w], -1))
        of_slots, of_window = jnp.split(probabilities, [u.shape[-1]], axis=-1)
        o = jnp.einsum("bkgm,bkmv->bkgv", of_slots, state.value, precision="highest")
        o = o + jnp.einsum("bkgs,bskv->bkgv", of_window, v, precision="highest")
        return (state, document), (o, _logsumexp(u), _logsumexp(w))

    return row


def _select(condition, new, old):
    return jax.tree.map(lambda x, y: jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y), new, old)


def _logsumexp(x):
    """Over the last axis; -inf, with gradient zero, where all are -inf."""
    some = (x > -jnp.inf).any(-1)
    return jnp.where(some, jax.nn.logsumexp(jnp.where(some[..., None], x, 0), -1), -jnp.inf)


def _softmax(x):
    """Over the last axis; zeros, with gradient zero, where all are -inf."""
    some = (x > -jnp.inf).any(-1, keepdims=True)
    return jnp.where(some, jax.nn.softmax(jnp.where(some, x, 0), -1), 0)
