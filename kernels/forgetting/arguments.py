"""The canonical form of a call to forgetting attention: checked once here, trusted everywhere below.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size of q and k, Dv head size of v.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting import pruning
from kernels.masks import Mask

DECAY_MODES = ("local", "global")
FEW_QUERIES = 8


def static(**options):
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of a block of query rows and a block of keys; they also fix what pruning may skip."""

    q: int
    k: int

    def __post_init__(self):
        if not (isinstance(self.q, int) and isinstance(self.k, int) and self.q > 0 and self.k > 0):
            raise ValueError(f"block sizes q={self.q!r}, k={self.k!r} must be positive integers")

    @classmethod
    def choose(cls, T: int, S: int) -> "BlockSizes":
        """Blocks near the target size that divide the padded lengths evenly; a few queries take all keys at once."""
        if T <= FEW_QUERIES:
            return cls(T, S)
        of_q, of_k = (128, 128) if T <= 1024 else (512, 256)  # measured on a CPU at T = 512 and 4096, D = 64
        return cls(_even(T, of_q), _even(S, of_k))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """What every implementation receives.

    q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] of one float dtype; log_f [B, S, H] in the accumulation dtype with
    0 at every gate that no visible pair reads, or None; threshold [B, H] (<= 0) or None, or [B, H, T] over a
    piece of the keys (see `sharded.py`); lengths in `mask` are [B]. Unless `sizes_given`, block_sizes are a default,
    which implementations may replace by their own.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_f: jax.Array | None
    threshold: jax.Array | None
    mask: Mask
    scale: float = static()
    decay_mode: str = static()
    block_sizes: BlockSizes = static()
    sizes_given: bool = static(default=True)

    def acp_start(self) -> jax.Array:
        """First key block each query block keeps under `threshold`, int32 [B, H, nq]."""
        T, sizes = self.q.shape[1], self.block_sizes
        return pruning.acp_start(self.log_f, self.threshold, self.mask.q_offset, T, sizes.q, sizes.k)

    @property
    def accumulator(self) -> jnp.dtype:
        """float32, or float64 for float64 operands: scores, softmax, decay sums and accumulators."""
        return jnp.promote_types(jnp.float32, self.q.dtype)


def canonicalize(
    q, k, v, log_f, *, mask, scale, acp_threshold, log_pruning_tolerance, decay_mode, block_sizes
) -> Arguments:
    """Checks a call and brings it into the one form the implementations share; see the public docstring for errors."""
    B, T, H, D, S = _check_shapes(q, k, v)
    mask = masks.validate(mask, B, T, S)
    if decay_mode not in DECAY_MODES:
        raise ValueError(f"{decay_mode=} is unknown; choose one of {DECAY_MODES}")
    scale = 1.0 / math.sqrt(D) if scale is None else float(scale)
    if log_f is not None:
        log_f = _check_gates(q, log_f, mask, T)
    elif acp_threshold is not None:
        raise ValueError(f"{acp_threshold=} prunes by decay and needs log_f; without gates leave it None")
    threshold = None
    if acp_threshold is not None:
        threshold = pruning.acp_delta(acp_threshold, q, k, scale=scale, tolerance=log_pruning_tolerance)
        threshold = threshold.astype(log_f.dtype)
    sizes = block_sizes or BlockSizes.choose(T, S)
    given = block_sizes is not None
    return Arguments(q, k, v, log_f, threshold, mask, scale, decay_mode, sizes, given)


def _check_shapes(q, k, v):
    """What the signature does not say; returns B, T, H, D, S."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    if min(*q.shape, *k.shape, *v.shape) == 0:
        raise ValueError(
            f"empty operands q {q.shape}, k {k.shape}, v {v.shape}: every dimension must be at least 1"
        )
    if H % K:
        raise ValueError(f"{H=} query heads must be a multiple of the {K=} key/value heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share one float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    return B, T, H, D, S


def _check_gates(q, log_f, mask, T):
    S = log_f.shape[1]
    if log_f.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"log_f has dtype {log_f.dtype}; cast the gate logits to float32 before log-sigmoid")
    if not mask.causal:
        raise ValueError(
            "log_f needs a causal mask: a forget gate has no meaning for later keys; use log_f=None"
        )
    if isinstance(mask.q_offset, int) and mask.q_offset + T > S:
        raise ValueError(f"q_offset={mask.q_offset} + {T=} passes the last of {S=} gates; lower q_offset")
    accumulator = jnp.promote_types(jnp.float32, q.dtype)
    unread = masks.unread_gates(mask, T, S)[:, :, None]
    # Unread gates must not touch the rounding of the others, and get a gradient of exactly zero.
    return jnp.where(unread, 0, log_f.astype(accumulator))


def _even(length, target):
    """Smallest multiple of 8 that covers `length` in ceil(length / target) equal blocks (or the length itself)."""
    blocks = math.ceil(length / target)
    return length if blocks == 1 else 8 * math.ceil(length / (8 * blocks))
