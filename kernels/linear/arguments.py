"""The canonical form of a call to linear attention: checked once here, trusted everywhere below.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size of q and k, Dv head size of v,
E = Dv + 1 columns of a state: the values, then a column of ones whose sum is the denominator (E = Dv without one).
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.masks import Mask


def static(**options):
    return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All keys so far, as seen from position n, the one after the last: Z = sum_s e^{i angle (n - s)} k_s [v_s, 1]^T.

    With decays, each entry has lost what the positions after its key took, up to n - 1.

    Attributes:
        real: [B, K, D, Dv + 1], real part of Z, float32 (float64 for float64 operands); the last column is the
            denominator's, absent ([B, K, D, Dv]) with denominator=False.
        imag: the same of the imaginary part; None where the angle is 0.
        segment: int32 [B], the document the keys belong to; None outside packed rows.
    """

    real: jax.Array
    imag: jax.Array | None = None
    segment: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """What every implementation receives.

    q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] of one float dtype, with k and v zero at keys that no query sees
    (padding, segment 0); angle [B or 1, D] (one a channel) or [B or 1, 1] (shared) in the accumulation dtype, or None
    for 0; key_decay [B, S, K, 1 or D] and value_decay [B, S, K, Dv] in the accumulation dtype, logarithms, 0 at keys
    that no query sees, or None; allowed bool [B, T, S] or None; state: the keys before position 0, complete (imag as
    the angle asks, segment as the mask asks), zero where none was given; seen_rows bool [B, T], False for rows of
    segment 0, or None. In `mask` padding has joined the document before it, and starts and lengths are gone: they are
    in k, v and the decays. aligned: query t stands at key t, in the same document. given_state: False where `state` is
    only zeros. denominator: the values have a column of ones beside them.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    angle: jax.Array | None
    key_decay: jax.Array | None
    value_decay: jax.Array | None
    allowed: jax.Array | None
    state: State
    mask: Mask
    seen_rows: jax.Array | None
    aligned: bool = static()
    given_state: bool = static()
    denominator: bool = static()
    chunk_size: int | None = static()

    @property
    def accumulator(self) -> jnp.dtype:
        """float32, or float64 for float64 operands: weights, sums, states and results."""
        return jnp.promote_types(jnp.float32, self.q.dtype)

    @property
    def decays(self) -> bool:
        return self.key_decay is not None or self.value_decay is not None


def canonicalize(
    q, k, v, *, mask, angle, log_key_decay, log_value_decay, allowed, initial_state, denominator, chunk_size
) -> Arguments:
    """Checks a call and brings it into the one form the implementations share; see the public docstring for errors."""
    (B, T, H, D), (S, K, Dv) = q.shape, v.shape[1:]
    if H % K:
        raise ValueError(f"{H=} query heads must be a multiple of the {K=} key/value heads")
    if min(B, T, S, H, D, Dv) == 0:
        raise ValueError(f"empty operands q {q.shape}, v {v.shape}: every dimension must be at least 1")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share one float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if mask.window is not None:
        raise ValueError(
            f"mask.window={mask.window}: a sum over all keys cannot forget those behind a window; leave it None"
        )
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"{chunk_size=} must be a positive integer, or None to choose it")
    if log_value_decay is not None and denominator:
        raise ValueError(
            "with log_value_decay every value channel has weights of its own, which no one denominator adds up; give "
            "denominator=False"
        )
    if not mask.causal and (log_key_decay is not None or log_value_decay is not None):
        raise ValueError(
            "mask.causal=False with a decay: it is what keys lose on the way to a later query, and says nothing of "
            "earlier ones; make the mask causal or leave the decay out"
        )
    in_place = isinstance(mask.q_offset, int) and mask.q_offset == 0 and T == S
    aligned = (
        in_place and mask.q_segments is mask.kv_segments
    )  # equal arrays cannot be told from unequal ones
    mask = masks.validate(mask, B, T, S)
    accumulator = jnp.promote_types(jnp.float32, q.dtype)
    angle = _check_angle(angle, B, D, accumulator)
    key_decay = _check_decay("log_key_decay", log_key_decay, accumulator)
    value_decay = _check_decay("log_value_decay", log_value_decay, accumulator)
    k, v, key_decay, value_decay = (
        None if x is None else _seen_keys(x, mask) for x in (k, v, key_decay, value_decay)
    )
    seen_rows = None if mask.q_segments is None else mask.q_segments != 0
    mask = _without_padding(mask)
    state = _check_state(initial_state, mask, angle, (B, K, D, Dv + denominator), accumulator)
    return Arguments(
        q, k, v, angle, key_decay, value_decay, allowed, state, mask, seen_rows,
        aligned=aligned, given_state=initial_state is not None, denominator=denominator, chunk_size=chunk_size,
    )  # fmt: skip


def _check_angle(angle, B, D, accumulator):
    """[B or 1, D or 1], or None for a Python 0. A shared angle is a constant; one a channel may be learned."""
    if isinstance(angle, (int, float)):
        return None if angle == 0 else jnp.full((1, 1), angle, accumulator)
    angle = jnp.asarray(angle)
    if not jnp.issubdtype(angle.dtype, jnp.floating):
        raise ValueError(f"angle has dtype {angle.dtype}, expected a float dtype (radians per position)")
    fits = angle.ndim <= 2 and all(n in (1, full) for n, full in zip(angle.shape[::-1], (D, B), strict=False))
    if not fits:
        raise ValueError(
            f"angle has shape {angle.shape}, expected a number, [D] or [B, 1 or D] with {B=} and {D=}"
        )
    angle = angle.reshape((1,) * (2 - angle.ndim) + angle.shape).astype(accumulator)
    return angle if angle.shape[1] > 1 else jax.lax.stop_gradient(angle)


def _check_decay(name, decay, accumulator):
    """[B, S, K, 1] where one number decays the whole state, or [B, S, K, channels]."""
    if decay is None:
        return None
    if decay.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"{name} has dtype {decay.dtype}, expected float32 (or float64): it is summed over positions"
        )
    return (decay[..., None] if decay.ndim == 3 else decay).astype(accumulator)


def _seen_keys(x, mask):
    """x [B, S, K, D] with zeros at keys which no query may see whatever its position."""
    keys, seen = jnp.arange(x.shape[1]), None
    for bound, test in ((mask.starts, jnp.greater_equal), (mask.lengths, jnp.less)):
        if bound is not None:
            seen = test(keys, bound[:, None]) if seen is None else seen & test(keys, bound[:, None])
    if mask.kv_segments is not None:
        seen = mask.kv_segments != 0 if seen is None else seen & (mask.kv_segments != 0)
    return x if seen is None else jnp.where(seen[:, :, None, None], x, 0)


def _without_padding(mask):
    """Padding joins the document before it, or else the first one (its keys are zero): each document is one run."""
    filled = {name: getattr(mask, name) for name in ("q_segments", "kv_segments")}
    filled = {name: None if x is None else _fill(x) for name, x in filled.items()}
    return dataclasses.replace(mask, starts=None, lengths=None, **filled)


def _fill(segments):
    """Each 0 of segments [B, T] becomes the last number before it, or else the first one in the row; int32."""
    segments = segments.astype(jnp.int32)
    real = segments != 0
    latest = jax.lax.cummax(jnp.where(real, jnp.arange(segments.shape[1]), -1), axis=1)
    return jnp.take_along_axis(segments, jnp.where(latest < 0, real.argmax(1)[:, None], latest), axis=1)


def _check_state(state, mask, angle, shape, accumulator):
    if state is None:
        state = State(jnp.zeros(shape, accumulator))
    imag = state.imag
    if angle is None and imag is not None:
        raise ValueError("initial_state has an imaginary part, which angle=0 never makes; give the angle")
    if angle is not None and imag is None:
        imag = jnp.zeros(shape, accumulator)  # the state of a call without angle: all keys at phase 0
    columns = "[B, K, D, Dv + 1], or Dv columns with denominator=False,"
    for name, x in (("real", state.real), ("imag", imag)):
        if x is not None and jnp.shape(x) != shape:
            raise ValueError(f"initial_state.{name} has shape {jnp.shape(x)}, expected {columns} = {shape}")
    if (state.segment is not None) and mask.kv_segments is None:
        raise ValueError("initial_state has a segment, but the mask has none; give the mask's segments too")
    segment = None
    if mask.kv_segments is not None:  # a state without a segment belongs to the row's first document
        segment = (
            mask.kv_segments[:, 0] if state.segment is None else jnp.asarray(state.segment).astype(jnp.int32)
        )
    parts = [None if x is None else jnp.asarray(x).astype(accumulator) for x in (state.real, imag)]
    return State(*parts, segment)
