"""The canonical form of a call to prefix softmax: checked once here, trusted everywhere below.

Letters: B batch, S positions, H logit heads, K value heads (K divides H), Dv value size.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import masks
from kernels.masks import Mask


def static(**options):
    return dataclasses.field(metadata={"static": True}, **options)


class PrefixState(NamedTuple):
    """What the keys so far come to: m their largest logit, z = sum of e^(s_j - m), n = sum of e^(s_j - m) v_j.

    m, z [B, H] and n [B, H, Dv], float32 (float64 for float64 operands); (-inf, 0, 0) before the first key. Only
    n / z and m + log z mean anything, so m is a constant to gradients: those of z and n are complete.
    """

    m: jax.Array
    z: jax.Array
    n: jax.Array


def empty_state(batch: int, heads: int, value_size: int, dtype=jnp.float32) -> PrefixState:
    """The state before the first key, m and z [batch, heads], n [batch, heads, value_size]."""
    m = jnp.full((batch, heads), -jnp.inf, dtype)
    return PrefixState(m, jnp.zeros_like(m), jnp.zeros((batch, heads, value_size), dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """What every implementation receives, and answers with (o [B, S, H, Dv], m [B, S, H], z [B, S, H]).

    s [B, S, H] in the accumulation dtype, -inf at keys nobody sees; v [B, S, K, Dv] of any float dtype; runs [B, S]
    int32 numbers the packed documents in order, padding counted to the one before it, or None for one document;
    the initial state m, z [B, H], n [B, H, Dv], or None.
    """

    s: jax.Array
    v: jax.Array
    runs: jax.Array | None
    m: jax.Array | None
    z: jax.Array | None
    n: jax.Array | None
    causal: bool = static()
    chunk_size: int = static()
    chunk_given: bool = static(default=True)  # by the caller


def default_chunk_size(value_size: int) -> int:
    """Positions a step takes at once: with few value channels the weights, S x chunk_size a head, are the cost."""
    return 128 if value_size >= 8 else 16


def canonicalize(s, v, *, mask: Mask, initial_state, return_state: bool, chunk_size) -> Arguments:
    """Checks a call; folds its mask into logits of -inf and document numbers. Errors: see the public docstring."""
    (B, S, H), (K, Dv) = s.shape, v.shape[2:]
    if H % K:
        raise ValueError(f"{H=} logit heads must be a multiple of the {K=} value heads")
    if min(B, S, H, Dv) == 0:
        raise ValueError(f"empty operands s {s.shape}, v {v.shape}: every dimension must be at least 1")
    _check_options(mask, initial_state, return_state, chunk_size)
    mask = masks.validate(mask, B, S, S)
    wide = jnp.promote_types(jnp.float32, jnp.promote_types(s.dtype, v.dtype))
    if initial_state is not None:
        initial_state = _check_state(initial_state, ((B, H), (B, H), (B, H, Dv)), wide)
    m, z, n = initial_state or (None, None, None)
    s = jnp.where(visible_keys(mask, S)[..., None], s.astype(wide), -jnp.inf)
    given, chunk_size = chunk_size is not None, min(S, chunk_size or default_chunk_size(Dv))
    return Arguments(s, v, document_runs(mask), m, z, n, mask.causal, chunk_size, given)


def _check_options(mask: Mask, initial_state, return_state, chunk_size):
    if mask.window is not None:
        raise ValueError(f"window={mask.window} has no prefix form; drop it, or use a windowed softmax")
    if isinstance(mask.q_offset, int) and mask.q_offset != 0:
        raise ValueError(
            f"q_offset={mask.q_offset} does not fit: rows are the keys here; give the keys before as initial_state"
        )
    if not mask.causal and (return_state or initial_state is not None):
        raise ValueError("a state belongs to the causal form; use causal=True or leave the state out")
    if initial_state is not None and mask.kv_segments is not None:
        raise ValueError("initial_state with segments would be of an unknown document; give one of the two")
    q, kv = mask.q_segments, mask.kv_segments
    concrete = not any(isinstance(x, jax.core.Tracer) for x in (q, kv))
    if q is not kv and concrete and not np.array_equal(q, kv):
        raise ValueError(
            "q_segments differ from kv_segments, but rows are the keys here; give the same twice"
        )
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size={chunk_size!r} must be a positive integer, or None to have it chosen")


def _check_state(state, shapes, dtype) -> PrefixState:
    state = PrefixState(*map(jnp.asarray, state))
    for name, x, shape in zip(PrefixState._fields, state, shapes, strict=True):
        if x.shape != shape:
            raise ValueError(f"initial_state.{name} has shape {x.shape}, expected {shape}")
    return PrefixState(*(x.astype(dtype) for x in state))


def visible_keys(mask: Mask, S: int) -> jax.Array:
    """Keys that any row of their document may see, bool [B or 1, S]."""
    index = jnp.arange(S)[None]
    seen = jnp.ones((1, S), bool)
    if mask.starts is not None:
        seen &= index >= mask.starts[:, None]
    if mask.lengths is not None:
        seen &= index < mask.lengths[:, None]
    return seen if mask.kv_segments is None else seen & (mask.kv_segments != 0)


def document_runs(mask: Mask) -> jax.Array | None:
    """Number of the document at or before each position, counted from 0 along the row, int32 [B, S]; None for one."""
    segments = mask.kv_segments
    if segments is None:
        return None
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    last = jax.lax.cummax(jnp.where(segments != 0, index, 0), axis=1)
    filled = jnp.take_along_axis(segments, last, axis=1)
    begins = filled[:, 1:] != filled[:, :-1]
    return jnp.pad(jnp.cumsum(begins, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def exp_difference(a: jax.Array, b: jax.Array) -> jax.Array:
    """e^(a - b) with e^(-inf - anything) = 0, and no NaN in the gradient."""
    some = a > -jnp.inf
    return jnp.where(some, jnp.exp(jnp.where(some, a - jnp.where(b > -jnp.inf, b, 0), 0)), 0)
