"""Any call brought onto lines of positions where query and key t stand together, which a causal scan can sweep.

Letters: B batch, T queries, S keys, L positions of a line, H query heads, K key/value heads, D head size, E = Dv + 1
columns (Dv without a denominator), P parts of a state: the real one, and the imaginary one if there is an angle.

Three ways, by what is asked:
- all keys: two sums over the keys, read by every query, with no scan;
- causal, query t at key t: the line is the call, with a shared angle inside the scan. With an angle a channel the
  features become x cos(angle t), x sin(angle t), whose products hold the cosine of the distance;
- queries elsewhere than keys, or packed documents without causality: a time line of all keys and queries, ordered so
  that what a query sees stands before it in its document. Features hold the angles here too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from kernels.linear import states
from kernels.linear.arguments import Arguments, State, static


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Line:
    """What a scan sweeps: row t reads the keys up to t of its document, and the state before position 0.

    q [B, L, H, D], k [B, L, K, D], v [B, L, K, Dv] of any float dtypes; angle [B or 1] in radians a position, a
    constant, or None; key_decay [B, L, K, 1 or D] and value_decay [B, L, K, Dv], logarithms in the accumulation dtype,
    or None; documents int32 [B, L], each number one run, or None; state [P, B, K, D, E] in the accumulation dtype, of
    the document `current` [B] (or None). denominator: a column of ones stands beside the values.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    angle: jax.Array | None
    key_decay: jax.Array | None
    value_decay: jax.Array | None
    documents: jax.Array | None
    state: jax.Array
    current: jax.Array | None
    denominator: bool = static()
    chunk_size: int | None = static()


# Line -> numerator [B, L, H, Dv], denominator [B, L, H] or None, the state as seen from position L [P, B, K, D, E].
Scan = Callable[[Line], tuple[jax.Array, jax.Array | None, jax.Array]]


def evaluate(arguments: Arguments, scan: Scan, turns_and_decays: bool = False):
    """The operation by way of a scan; turns_and_decays: it takes a shared angle and decays of one number together.

    Returns numerator, denominator and the state after the last key.
    """
    a = arguments
    if _is_line(a, turns_and_decays):
        num, den, state = _in_place(a, scan)
    else:
        state = states.append(a)
        if not a.mask.causal and a.mask.q_segments is None:
            num, den = _columns(a, states.read(a, states.turn(state, a.angle, -a.k.shape[1])))
        else:
            num, den = _by_features(a, scan)
            if a.given_state:
                of_state = _columns(a, states.read(a, a.state))
                num, den = num + of_state[0], None if den is None else den + of_state[1]
    if a.seen_rows is not None:
        num = jnp.where(a.seen_rows[:, :, None, None], num, 0)
        den = None if den is None else jnp.where(a.seen_rows[:, :, None], den, 0)
    return num, den, state


def _is_line(a, turns_and_decays):
    """Whether the scan can sweep the call as it is."""
    if not (a.mask.causal and a.aligned):
        return False
    if a.angle is None:
        return True
    one_number = a.value_decay is None and (a.key_decay is None or a.key_decay.shape[3] == 1)
    return a.angle.shape[1] == 1 and (not a.decays or (turns_and_decays and one_number))


def _in_place(a, scan):
    state = a.state.real[None] if a.angle is None else jnp.stack([a.state.real, a.state.imag])
    angle, documents = None if a.angle is None else a.angle[:, 0], a.mask.kv_segments
    num, den, state = scan(_line(a, a.q, a.k, a.v, angle, a.key_decay, a.value_decay, documents, state))
    last = None if documents is None else documents[:, -1]
    return num, den, State(state[0], None if angle is None else state[1], last)


def _line(a, q, k, v, angle, key_decay, value_decay, documents, state):
    return Line(q, k, v, angle, key_decay, value_decay, documents, state, a.state.segment,
                denominator=a.denominator, chunk_size=a.chunk_size)  # fmt: skip


def _by_features(a, scan):
    """The part of the keys of this call, with the angles in the features."""
    B, T, S = *a.q.shape[:2], a.k.shape[1]
    q, k, v, key_decay = a.q, a.k, a.v, a.key_decay
    if a.angle is not None:
        q = jnp.concatenate(states.rotated(_wide(a, q), a.angle, a.mask.q_offset + jnp.arange(T)), axis=-1)
        k = jnp.concatenate(states.rotated(_wide(a, k), a.angle, jnp.arange(S)), axis=-1)
        v = _wide(a, v)
        if key_decay is not None and key_decay.shape[3] > 1:
            key_decay = jnp.concatenate([key_decay, key_decay], axis=-1)
    empty = jnp.zeros((1, B, k.shape[2], k.shape[3], v.shape[3] + a.denominator), a.accumulator)
    if a.mask.causal and a.aligned:
        line = _line(a, q, k, v, None, key_decay, a.value_decay, a.mask.kv_segments, empty)
        return scan(line)[:2]
    order, documents = _time_line(a.mask, T, S)

    def placed(of_keys, of_queries=None):
        some = of_keys if of_queries is None else of_queries
        zeros = jnp.zeros((B, T if of_queries is None else S, *some.shape[2:]), some.dtype)
        pair = (of_keys, zeros) if of_queries is None else (zeros, of_queries)
        return _take(jnp.concatenate(pair, axis=1), order)

    key_decay, value_decay = (None if x is None else placed(x) for x in (key_decay, a.value_decay))
    line = _line(a, placed(None, q), placed(k), placed(v), None, key_decay, value_decay, documents, empty)
    num, den, _ = scan(line)
    back = jnp.argsort(order, axis=1)[:, S:]
    return _take(num, back), None if den is None else _take(den[..., None], back)[..., 0]


def _wide(a, x):
    return x.astype(a.accumulator)


def _columns(a, n):
    return (n[..., :-1], n[..., -1]) if a.denominator else (n, None)


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
