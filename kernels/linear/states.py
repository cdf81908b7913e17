"""States: all keys so far folded into sums of fixed size, and what can be done with them.

Letters: B batch, T queries, S keys, K key/value heads, G query heads a key/value head, D head size, E = Dv + 1 columns;
Z = sum_s e^{i angle (n - s)} k_s [v_s, 1]^T as seen from position n, kept as its real and imaginary part [B, K, D, E].

    seen from d further on:   e^{i angle d} Z                                  `turn`
    read by a query there:    Re(Z)^T q                                        `read`
    with keys added:          Z + sum_s e^{i angle (S - s)} k_s [v_s, 1]^T     `append`

Reading and adding let the decays of the call's keys act on Z, on q and k (key channels) and on what is read or v (value
channels). Without a denominator there is no column of ones and E = Dv.
"""

import jax
import jax.numpy as jnp

from kernels.linear import decays
from kernels.linear.arguments import Arguments, State


def with_ones(v: jax.Array) -> jax.Array:
    """[..., Dv] -> [..., Dv + 1]: the last column adds up the weights."""
    return jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)


def turn(state: State, angle: jax.Array | None, distance) -> State:
    """The same keys seen from `distance` positions further on; angle [B or 1, D or 1]."""
    if angle is None:
        return state
    cos, sin = (f(angle * distance)[:, None, :, None] for f in (jnp.cos, jnp.sin))
    real = cos * state.real - sin * state.imag
    return State(real, sin * state.real + cos * state.imag, state.segment)


def rotated(x: jax.Array, angle: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x cos(angle p) and x sin(angle p) for x [B, T, ..., D] at positions p [T]."""
    phase = angle[:, None] * positions[:, None].astype(angle.dtype)  # [B or 1, T, D or 1]
    phase = phase.reshape(*phase.shape[:2], *(1,) * (x.ndim - 3), phase.shape[2])
    return x * jnp.cos(phase), x * jnp.sin(phase)


def read(arguments: Arguments, state: State) -> jax.Array:
    """[B, T, H, E]: what the queries get from keys of `state`, seen from position 0, if in the same document."""
    a, (B, T, H, D), K = arguments, arguments.q.shape, arguments.k.shape[2]
    q = a.q.astype(a.accumulator).reshape(B, T, K, H // K, D)
    rows = decays.rows_of(a.mask.q_offset, T, a.k.shape[1])
    if a.key_decay is not None:
        q = q * decays.to_rows(a.key_decay, rows)[:, :, :, None]
    if a.angle is None:
        n = _product("btkgd,bkde->btkge", q, state.real)
    else:
        cos, sin = rotated(q, a.angle, a.mask.q_offset + jnp.arange(T))
        n = _product("btkgd,bkde->btkge", cos, state.real) - _product("btkgd,bkde->btkge", sin, state.imag)
    if a.value_decay is not None:
        n = n * decays.to_rows(a.value_decay, rows)[:, :, :, None]
    if a.mask.q_segments is not None:
        n = jnp.where((a.mask.q_segments == state.segment[:, None])[:, :, None, None, None], n, 0)
    return n.reshape(B, T, H, -1)


def append(arguments: Arguments) -> State:
    """The state after the last key: the given one, turned, and the keys of the last document."""
    a, S = arguments, arguments.k.shape[1]
    k, v = a.k.astype(a.accumulator), a.v.astype(a.accumulator)
    v = with_ones(v) if a.denominator else v
    old, segment = turn(a.state, a.angle, S), None
    if a.key_decay is not None:
        k, old = k * decays.to_end(a.key_decay), _scaled(old, decays.through(a.key_decay)[..., None])
    if a.value_decay is not None:
        v, old = v * decays.to_end(a.value_decay), _scaled(old, decays.through(a.value_decay)[:, :, None])
    if a.mask.kv_segments is not None:
        segment = a.mask.kv_segments[:, -1]
        k = jnp.where((a.mask.kv_segments == segment[:, None])[:, :, None, None], k, 0)
        kept = (segment == a.state.segment)[:, None, None, None]
        old = jax.tree.map(lambda x: jnp.where(kept, x, 0), State(old.real, old.imag))
    if a.angle is None:
        return State(old.real + _product("bskd,bske->bkde", k, v), None, segment)
    cos, sin = rotated(k, a.angle, S - jnp.arange(S))
    real = old.real + _product("bskd,bske->bkde", cos, v)
    return State(real, old.imag + _product("bskd,bske->bkde", sin, v), segment)


def _scaled(state, factor):
    return State(state.real * factor, None if state.imag is None else state.imag * factor, state.segment)


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, precision="highest")
