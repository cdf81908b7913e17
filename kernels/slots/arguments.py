"""The canonical form of a call to slot attention: checked once here, trusted everywhere below.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size of q and k, Dv head size of v, M
slots, W window, n slot shift.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.masks import Mask

EMPTY_SLOTS = ("sink", "mask")
DOCUMENT_STATES = ("zero", "initial")


def static(**options):
    return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotState:
    """What the slots hold between two tokens.

    key [B, K, M, D] and value [B, K, M, Dv], float32 (float64 for float64 operands); written [B] bool, whether any
    token entered the slots (read by empty_slots="mask" only). As an initial state, written=None means: all are.
    """

    key: jax.Array
    value: jax.Array
    written: jax.Array | None = None


@dataclass(frozen=True)
class ChunkSizes:
    """Rows of a chunk (states are saved between chunks for the backward pass) and of the blocks it is computed in.

    Within a block the work is quadratic in its size and holds block x block x M decay factors a key/value head.
    """

    chunk: int
    block: int

    def __post_init__(self):
        if not (isinstance(self.chunk, int) and isinstance(self.block, int) and self.block > 0 < self.chunk):
            raise ValueError(f"chunk={self.chunk!r} and block={self.block!r} must be positive integers")
        if self.chunk % self.block:
            raise ValueError(f"chunk={self.chunk} must be a multiple of block={self.block}")

    @classmethod
    def choose(cls, T: int) -> "ChunkSizes":
        """Blocks of 16 rows; of long sequences chunks of about 4 sqrt(T), so that saved states and chunks balance."""
        if T <= 256:
            return cls(T, T) if T <= 16 else cls(16 * math.ceil(T / 16), 16)
        return cls(16 * max(1, min(16, round(math.sqrt(T / 16)))), 16)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """What every implementation receives.

    q, q_window [B, T, H, .], k, k_window [B, S, K, .], v [B, S, K, Dv] of one float dtype; log_gates [B, S, K, M] and
    state in the accumulation dtype; `mask` is causal and has no window; `shift` is n.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_window: jax.Array
    k_window: jax.Array
    log_gates: jax.Array
    state: SlotState
    mask: Mask
    window: int = static()
    shift: int = static()
    empty_slots: str = static()
    document_state: str = static()
    scale: float = static()
    chunk_sizes: ChunkSizes = static()

    @property
    def accumulator(self) -> jnp.dtype:
        """float32, or float64 for float64 operands: logits, softmax, gates and states."""
        return jnp.promote_types(jnp.float32, self.q.dtype)


def canonicalize(
    q, k, v, log_gates, *, window, q_window, k_window, mask, slot_shift, empty_slots, initial_state,
    document_state, scale, chunk_sizes,
) -> Arguments:  # fmt: skip
    """Checks a call beyond its shapes and brings it into the one form the implementations share."""
    (B, T, H, D), (S, K, M) = q.shape, log_gates.shape[1:]
    if H % K:
        raise ValueError(f"{H=} query heads must be a multiple of the {K=} key/value heads")
    if min(B, T, S, H, D, M, v.shape[3]) == 0:
        raise ValueError(
            f"empty operands q {q.shape}, v {v.shape}, log_gates {log_gates.shape}: sizes must be at least 1"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share one float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if log_gates.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"log_gates has dtype {log_gates.dtype}; cast the gate logits to float32 before log-sigmoid"
        )
    _check_options(window, slot_shift, empty_slots, document_state)
    if (q_window is None) != (k_window is None):
        missing = "q_window" if q_window is None else "k_window"
        raise ValueError(f"{missing} is missing; give q_window and k_window together or neither")
    mask = _check_mask(masks.validate(mask, B, T, S), T, S)
    accumulator = jnp.promote_types(jnp.float32, q.dtype)
    return Arguments(
        q, k, v,
        q if q_window is None else q_window.astype(q.dtype),
        k if k_window is None else k_window.astype(k.dtype),
        log_gates.astype(accumulator),
        _state(initial_state, (B, K, M, D), v.shape[3], accumulator),
        mask, window, window if slot_shift is None else slot_shift, empty_slots, document_state,
        D**-0.5 if scale is None else float(scale), chunk_sizes or ChunkSizes.choose(T),
    )  # fmt: skip


def _check_options(window, slot_shift, empty_slots, document_state):
    if not isinstance(window, int) or window < 0:
        raise ValueError(f"{window=} must be a non-negative integer; 0 means slots only")
    if slot_shift is not None and (not isinstance(slot_shift, int) or slot_shift < 0):
        raise ValueError(f"{slot_shift=} must be a non-negative integer, or None for the window's size")
    if empty_slots not in EMPTY_SLOTS:
        raise ValueError(f"{empty_slots=} is unknown; choose one of {EMPTY_SLOTS}")
    if document_state not in DOCUMENT_STATES:
        raise ValueError(f"{document_state=} is unknown; choose one of {DOCUMENT_STATES}")


def _check_mask(mask, T, S):
    if not mask.causal:
        raise ValueError(
            "slot attention is causal only: a recurrent state has no later tokens; use causal=True"
        )
    if mask.window is not None:
        raise ValueError(f"mask.window={mask.window} is not read here; give window= to the operation instead")
    if isinstance(mask.q_offset, int) and not 0 <= mask.q_offset <= S - T:
        raise ValueError(
            f"q_offset={mask.q_offset} with {T=} queries leaves the {S=} keys; a query's own key is needed"
        )
    if mask.q_segments is None:
        return mask
    small = {name: getattr(mask, name).astype(jnp.int32) for name in ("q_segments", "kv_segments")}
    return dataclasses.replace(mask, **small)


def _state(initial, key_shape, Dv, accumulator) -> SlotState:
    B, value_shape = key_shape[0], (*key_shape[:3], Dv)
    if initial is None:
        return SlotState(
            jnp.zeros(key_shape, accumulator), jnp.zeros(value_shape, accumulator), jnp.zeros(B, bool)
        )
    key, value = (jnp.asarray(x).astype(accumulator) for x in (initial.key, initial.value))
    if key.shape != key_shape or value.shape != value_shape:
        raise ValueError(
            f"initial_state has key {key.shape} and value {value.shape}, expected {key_shape} and {value_shape}"
        )
    written = jnp.ones(B, bool) if initial.written is None else jnp.asarray(initial.written)
    if written.shape != (B,) or written.dtype != bool:
        raise ValueError(f"initial_state.written is {written.dtype}{list(written.shape)}, expected bool[{B}]")
    return SlotState(key, value, written)
