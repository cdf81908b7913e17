"""Decode states of cosFormer (arXiv 2202.08791): all keys so far in sums of fixed size, in two frames that are equal.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, Dv value size, delta the angle a
position, n the position after the last key, F_s = act(k_s) [v_s, 1]^T; the column of ones adds up the denominator.

    absolute:  C = sum_s cos(delta s) F_s,  N = sum_s sin(delta s) F_s            `AbsoluteState`
               num, den of query t = act(q_t) . (cos(delta t) C + sin(delta t) N)
    rotating:  Z = sum_s e^{i delta (n - s)} F_s                                  `kernels.linear.State`
               num, den of query n = act(q_n) . Re(Z + F_n)

The absolute frame needs positions, the rotating one does not. Features are those after the activation.
"""

import jax.numpy as jnp
from flax import struct

from kernels.linear import State
from kernels.signatures import Array


@struct.dataclass
class AbsoluteState:
    """cos and sin [B, K, D, Dv + 1]: sums of cos(delta s) F_s and sin(delta s) F_s; the last column is z.

    In features and weights that are not negative nothing cancels here.
    """

    cos: Array
    sin: Array


def absolute_state(
    fk: Array, v: Array, angle: float | Array, positions: Array, state: AbsoluteState | None = None
) -> AbsoluteState:
    """The state of features fk [B, S, K, D] and v [B, S, K, Dv] at positions [B or 1, S], added to `state`.

    angle: delta, or one a channel [D]. Float32 (float64 for float64 operands). Zero features leave no trace.
    """
    wide = jnp.promote_types(jnp.float32, fk.dtype)
    fk, v = fk.astype(wide), _with_ones(v.astype(wide))
    new = [
        jnp.einsum("bskd,bske->bkde", fk * f, v, precision="highest")
        for f in _cos_sin(angle, positions, wide)
    ]
    return AbsoluteState(*new) if state is None else AbsoluteState(state.cos + new[0], state.sin + new[1])


def read_absolute(
    state: AbsoluteState, fq: Array, angle: float | Array, positions: Array
) -> tuple[Array, Array]:
    """num [B, T, H, Dv] and den [B, T, H] of features fq [B, T, H, D] at positions [B or 1, T]."""
    fq = fq.astype(state.cos.dtype)
    cos, sin = _cos_sin(angle, positions, fq.dtype)
    n = _read(fq * cos, state.cos) + _read(fq * sin, state.sin)
    return n[..., :-1], n[..., -1]


def absolute_step(
    state: AbsoluteState, fq: Array, fk: Array, v: Array, angle: float | Array, positions: Array
):
    """One token, fq [B, 1, H, D], fk and v [B, 1, K, D or Dv] at positions [B or 1, 1]: num, den, the new state."""
    state = absolute_state(fk, v, angle, positions, state)
    return *read_absolute(state, fq, angle, positions), state


def rotating_state(fk: Array, v: Array, angle: float | Array) -> State:
    """The state of features fk [B, S, K, D] and v [B, S, K, Dv] of consecutive positions, seen from the next one."""
    return to_rotating(absolute_state(fk, v, angle, -jnp.arange(fk.shape[1], 0, -1)[None]), angle, 0)


def rotating_step(state: State, fq: Array, fk: Array, v: Array, angle: float | Array):
    """One token, fq [B, 1, H, D], fk and v [B, 1, K, D or Dv]: num, den, the new state. No position is needed."""
    wide = state.real.dtype
    new = jnp.einsum("bkd,bke->bkde", fk[:, 0].astype(wide), _with_ones(v[:, 0].astype(wide)))
    real, n = state.real + new, _read(fq.astype(wide), state.real + new)
    cos, sin = _turn(angle, 1, wide)
    state = State(cos * real - sin * state.imag, sin * real + cos * state.imag)
    return n[..., :-1], n[..., -1], state


def to_rotating(state: AbsoluteState, angle: float | Array, position: int | Array) -> State:
    """The same keys seen from `position`: Z = e^{i delta position} (C - i N)."""
    cos, sin = _turn(angle, position, state.cos.dtype)
    return State(cos * state.cos + sin * state.sin, sin * state.cos - cos * state.sin)


def to_absolute(state: State, angle: float | Array, position: int | Array) -> AbsoluteState:
    """The inverse of `to_rotating`."""
    cos, sin = _turn(angle, position, state.real.dtype)
    return AbsoluteState(cos * state.real + sin * state.imag, sin * state.real - cos * state.imag)


def _with_ones(v):
    return jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)


def _cos_sin(angle, positions, dtype):
    """[B or 1, T, 1, D or 1] each, of positions [B or 1, T]."""
    phase = (jnp.asarray(angle, dtype) * positions[..., None].astype(dtype))[:, :, None]
    return jnp.cos(phase), jnp.sin(phase)


def _turn(angle, position, dtype):
    """Cosine and sine of the angle at one position, [D or 1, 1]."""
    phase = jnp.atleast_1d(jnp.asarray(angle, dtype) * jnp.asarray(position, dtype))[:, None]
    return jnp.cos(phase), jnp.sin(phase)


def _read(fq, state):
    """fq [B, T, H, D] of state [B, K, D, E]: [B, T, H, E], query head h from key/value head h // (H / K)."""
    (B, T, H, D), K = fq.shape, state.shape[1]
    n = jnp.einsum("btkgd,bkde->btkge", fq.reshape(B, T, K, H // K, D), state, precision="highest")
    return n.reshape(B, T, H, -1)
