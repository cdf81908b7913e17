"""Linear attention in pure JAX, with time and memory linear in T and S and its own gradient.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, E = Dv + 1 columns.

Three ways, by what is asked:
- all keys: two sums over the keys, read by every query;
- causal, query t at key t: the scan of `chunks.py`, with a shared angle inside it. With an angle a channel the features
  become x cos(angle t), x sin(angle t), whose products hold the cosine of the distance;
- queries elsewhere than keys, or packed documents without causality: the same scan over a time line of all keys and
  queries, ordered so that what a query sees stands before it in its document. Features hold the angles here too.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels.linear import states
from kernels.linear.arguments import Arguments, State
from kernels.linear.chunks import chunked

CHUNK = 128


def blockwise(arguments: Arguments) -> tuple[jax.Array, jax.Array, State]:
    """Numerator [B, T, H, Dv], denominator [B, T, H] and the state after the last key, in the accumulation dtype."""
    a = arguments
    if a.mask.causal and a.aligned and (a.angle is None or a.angle.shape[1] == 1):
        n, state = _in_place(a)
    else:
        state = states.append(a)
        if not a.mask.causal and a.mask.q_segments is None:
            n = states.read(a, states.turn(state, a.angle, -a.k.shape[1]))
        else:
            n = _by_features(a)
            n = n + states.read(a, a.state) if a.given_state else n
    if a.seen_rows is not None:
        n = jnp.where(a.seen_rows[:, :, None, None], n, 0)
    return n[..., :-1], n[..., -1], state


def why_unsupported(arguments: Arguments) -> str | None:
    if arguments.allowed is not None:
        return "it takes no dense `allowed` matrix, which has T x S entries"
    return None


def even_chunk(length: int) -> int:
    """The chunk size that covers `length` in as few chunks of at most CHUNK as possible, with the least padding."""
    return math.ceil(length / math.ceil(length / CHUNK))


def _in_place(a):
    state = a.state.real[None] if a.angle is None else jnp.stack([a.state.real, a.state.imag])
    angle, ids = None if a.angle is None else a.angle[:, 0], a.mask.kv_segments
    n, state, extra = _scan(a, a.q, a.k, a.v, angle, ids, state)
    segment = None if ids is None else ids[:, -1]
    # The padding of the last chunk moved the point of view on.
    return n, states.turn(State(state[0], None if angle is None else state[1], segment), a.angle, -extra)


def _scan(a, q, k, v, angle, ids, state):
    """`chunked` on [B, L, H or K, D] operands of any length: n [B, L, H, E], the state, and the padding's length."""
    (B, L, H, D), K = q.shape, k.shape[2]
    C = min(a.chunk_size, L) if a.chunk_size else even_chunk(L)
    extra = -L % C
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q, k, v))
    ids = None if ids is None else jnp.pad(ids, ((0, 0), (0, extra)), mode="edge")
    q = q.reshape(B, L + extra, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    n, state = chunked(C, q, k, v, angle, ids, state, a.state.segment)
    n = n.transpose(0, 3, 1, 2, 4).reshape(B, L + extra, H, -1)[:, :L]
    return n, state, extra


def _by_features(a):
    """The part of the keys of this call, [B, T, H, E], with the angles in the features."""
    B, T, S = *a.q.shape[:2], a.k.shape[1]
    q, k, v = (x.astype(a.accumulator) for x in (a.q, a.k, a.v))
    if a.angle is not None:
        q = jnp.concatenate(states.rotated(q, a.angle, a.mask.q_offset + jnp.arange(T)), axis=-1)
        k = jnp.concatenate(states.rotated(k, a.angle, jnp.arange(S)), axis=-1)
    empty = jnp.zeros((1, B, k.shape[2], k.shape[3], v.shape[3] + 1), a.accumulator)
    if a.mask.causal and a.aligned:
        return _scan(a, q, k, v, None, a.mask.kv_segments, empty)[0]
    order, ids = _time_line(a.mask, T, S)
    zeros = lambda x, length: jnp.zeros((B, length, *x.shape[2:]), x.dtype)  # noqa: E731
    q, k, v = (
        _take(jnp.concatenate(pair, axis=1), order)
        for pair in ((zeros(q, S), q), (k, zeros(k, T)), (v, zeros(v, T)))
    )
    n = _scan(a, q, k, v, None, ids, empty)[0]
    return _take(n, jnp.argsort(order, axis=1)[:, S:])


def _time_line(mask, T, S):
    """Order of the S keys and T queries, int32 [B or 1, S + T], and the document of each place, or None."""
    position = jnp.concatenate([jnp.arange(S), mask.q_offset + jnp.arange(T)])[None]
    position = position if mask.causal else jnp.zeros_like(position)
    is_query = (jnp.arange(S + T) >= S)[None]
    keys = [position, is_query.astype(jnp.int32)]
    if mask.q_segments is not None:
        keys.insert(0, jnp.concatenate([mask.kv_segments, mask.q_segments], axis=1))
    keys = [
        jnp.broadcast_to(x, (keys[0].shape[0], S + T)).astype(jnp.int32) for x in (*keys, jnp.arange(S + T))
    ]
    *sorted_keys, order = lax.sort(keys, num_keys=len(keys) - 1)
    return order, None if mask.q_segments is None else sorted_keys[0]


def _take(x, index):
    """x [B, L, H, D] at index [B or 1, J] of axis 1."""
    if index.shape[0] == 1:
        return jnp.take(x, index[0], axis=1)
    return jnp.take_along_axis(x, index[:, :, None, None], axis=1)
