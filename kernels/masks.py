"""Which key each query may see: one description, read by the dense and by the blockwise code alike.

Letters: B batch, T queries, S keys; i a query row (0..T-1), j a key (0..S-1), a_i = q_offset + i the row's absolute
position; m a block of query rows, n a block of keys. Boolean results lead with B, or with 1 where all batch rows agree.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

LARGEST = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Visibility of key j to query row i: every condition that is set must hold.

    Attributes:
        causal: j <= a_i.
        window: 0 <= a_i - j < window, so a row sees itself and window - 1 older keys; needs causal.
        q_offset: absolute position of query row 0; a Python int, or an int32 scalar that may be traced.
        q_segments: int32 [B, T], the document of each query; 0 is padding, which sees nothing.
        kv_segments: int32 [B, S], the document of each key; visible iff equal to the query's and not 0.
        starts: int32 [B], left padding: j >= starts[b].
        lengths: int32 [B] or a scalar, filled part of the keys: j < lengths[b].

    Example, T = S = 4 with window=2 (row = query, 1 = visible):  1000 / 1100 / 0110 / 0011.
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    q_offset: int | jax.Array = 0
    q_segments: jax.Array | None = None
    kv_segments: jax.Array | None = None
    starts: jax.Array | None = None
    lengths: int | jax.Array | None = None

    def __post_init__(self):
        if self.window is not None and not self.causal:
            raise ValueError(
                f"window={self.window} needs causal=True; drop the window or make the mask causal"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window={self.window} must be at least 1 (a row sees itself); None means no window"
            )
        if (self.q_segments is None) != (self.kv_segments is None):
            missing = "q_segments" if self.q_segments is None else "kv_segments"
            raise ValueError(f"{missing} is missing; give q_segments and kv_segments together or neither")


def validate(mask: Mask, B: int, T: int, S: int) -> Mask:
    """Checks the arrays of a mask against the sizes of an operation; returns it with JAX arrays, `lengths` as [B].

    Raises ValueError naming the field, its shape or dtype, and what was expected.
    """
    expected = {"q_offset": (), "q_segments": (B, T), "kv_segments": (B, S), "starts": (B,), "lengths": (B,)}
    if mask.lengths is not None and jnp.ndim(mask.lengths) == 0:
        mask = dataclasses.replace(mask, lengths=jnp.full((B,), mask.lengths, jnp.int32))
    for name, shape in expected.items():
        value = getattr(mask, name)
        if value is None:
            continue
        if jnp.shape(value) != shape:
            raise ValueError(
                f"mask.{name} has shape {jnp.shape(value)}, expected {shape} for {B=}, {T=}, {S=}"
            )
        if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
            raise ValueError(f"mask.{name} has dtype {jnp.result_type(value)}, expected an integer dtype")
        if name != "q_offset":
            mask = dataclasses.replace(mask, **{name: jnp.asarray(value)})
    return mask


def visible(mask: Mask, rows: jax.Array, cols: jax.Array) -> jax.Array:
    """Visibility of keys `cols` [C] to query rows `rows` [R] (integer indices): bool [B or 1, R, C].

    Rows past the end of q_segments and keys past the end of kv_segments belong to segment 0 and are invisible.
    """
    behind = (mask.q_offset + rows)[:, None] - cols[None, :]
    seen = (behind >= 0 if mask.causal else jnp.ones(behind.shape, bool))[None]
    if mask.window is not None:
        seen &= behind < mask.window
    if mask.starts is not None:
        seen &= cols >= mask.starts[:, None, None]
    if mask.lengths is not None:
        seen &= cols < mask.lengths[:, None, None]
    if mask.q_segments is not None:
        of_rows = jnp.take(mask.q_segments, rows, axis=1, mode="fill", fill_value=0)[:, :, None]
        of_cols = jnp.take(mask.kv_segments, cols, axis=1, mode="fill", fill_value=0)[:, None, :]
        seen &= (of_rows == of_cols) & (of_rows != 0)
    return seen


def dense(mask: Mask, T: int, S: int) -> jax.Array:
    """The whole visibility matrix, bool [B or 1, T, S]."""
    return visible(mask, jnp.arange(T), jnp.arange(S))


def visible_blocks(mask: Mask, T: int, S: int, block_q: int, block_k: int) -> jax.Array:
    """Blocks that may hold a visible pair, bool [B or 1, ceil(T / block_q), ceil(S / block_k)].

    Never False for a block with a visible pair; may be True for one without (segments are compared by their range).
    """
    top, left = jnp.arange(0, T, block_q), jnp.arange(0, S, block_k)
    bottom, right = jnp.minimum(top + block_q, T) - 1, jnp.minimum(left + block_k, S) - 1
    oldest, newest = (mask.q_offset + top)[:, None], (mask.q_offset + bottom)[:, None]
    needed = (left <= newest if mask.causal else jnp.ones((len(top), len(left)), bool))[None]
    if mask.window is not None:
        needed &= oldest - right < mask.window
    if mask.starts is not None:
        needed &= right >= mask.starts[:, None, None]
    if mask.lengths is not None:
        needed &= left < mask.lengths[:, None, None]
    if mask.q_segments is not None:
        q_low, q_high = (x[:, :, None] for x in _segment_range(mask.q_segments, block_q))
        k_low, k_high = (x[:, None, :] for x in _segment_range(mask.kv_segments, block_k))
        needed &= (q_low <= k_high) & (k_low <= q_high)
    return needed


def clear_blocks(mask: Mask, T: int, S: int, block_q: int, block_k: int) -> jax.Array:
    """Blocks in which every pair is visible, so that no mask need be applied; shaped as `visible_blocks`.

    Rows past T do not count, keys past S are never visible.
    """
    top, left = jnp.arange(0, T, block_q), jnp.arange(0, S, block_k)
    bottom, right = jnp.minimum(top + block_q, T) - 1, left + block_k - 1
    oldest, newest = (mask.q_offset + top)[:, None], (mask.q_offset + bottom)[:, None]
    clear = ((right < S) & (right <= oldest if mask.causal else jnp.ones((len(top), len(left)), bool)))[None]
    if mask.window is not None:
        clear &= newest - left < mask.window
    if mask.starts is not None:
        clear &= left >= mask.starts[:, None, None]
    if mask.lengths is not None:
        clear &= right < mask.lengths[:, None, None]
    if mask.q_segments is not None:
        (q_low, q_high), (k_low, k_high) = (_all_segments(x, n) for x, n in
                                            ((mask.q_segments, block_q), (mask.kv_segments, block_k)))  # fmt: skip
        one = jnp.where((q_low == q_high) & (q_low != 0), q_low, -1)[:, :, None]
        clear &= (one == k_low[:, None, :]) & (one == k_high[:, None, :])
    return clear


def clear_range(clear: jax.Array, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """The first run of True along an axis, first and end, int32 without that axis; (0, 0) if there is none."""
    clear = jnp.moveaxis(clear, axis, -1)
    first = jnp.argmax(clear, axis=-1)
    later_gap = ~clear & (jnp.arange(clear.shape[-1]) > first[..., None])
    end = jnp.where(later_gap.any(-1), jnp.argmax(later_gap, axis=-1), clear.shape[-1])
    some = clear.any(-1)
    return jnp.where(some, first, 0).astype(jnp.int32), jnp.where(some, end, 0).astype(jnp.int32)


def key_block_range(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and end key block of each query block: two int32 [..., nq] from bool [..., nq, nk]; (0, 0) if none."""
    return _extent(blocks, axis=-1)


def query_block_range(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and end query block of each key block: two int32 [..., nk] from bool [..., nq, nk]; (0, 0) if none."""
    return _extent(blocks, axis=-2)


def unread_gates(mask: Mask, T: int, S: int) -> jax.Array:
    """Keys l whose gate log_f_l enters no visible pair j < l <= a_i, bool [B or 1, S] (causal masks).

    True at the first visible key of a row, at and before `starts`, at padding, past the last query, and at the first
    token of each segment when segment numbers grow along the row (as packing makes them). False may be conservative.
    """
    keys = jnp.arange(S)
    unread = ((keys <= 0) | (keys > mask.q_offset + T - 1))[None]
    if mask.starts is not None:
        unread |= keys <= mask.starts[:, None]
    if mask.lengths is not None:
        unread |= keys >= mask.lengths[:, None]
    if mask.q_segments is not None:
        older = jnp.pad(jax.lax.cummax(mask.kv_segments, axis=1)[:, :-1], ((0, 0), (1, 0)))
        queries = jnp.where(mask.q_segments == 0, LARGEST, mask.q_segments)
        readers = jax.lax.cummin(queries, axis=1, reverse=True)
        readers = jnp.take(readers, jnp.clip(keys - mask.q_offset, 0, T - 1), axis=1)
        unread |= (older < readers) | (mask.kv_segments == 0)
    return unread


def _segment_range(segments, block):
    """Smallest and largest non-padding segment of each block, two [B, blocks]; an empty range where all is padding."""
    padded = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)))
    chunks = padded.reshape(padded.shape[0], -1, block)
    return jnp.where(chunks == 0, LARGEST, chunks).min(-1), jnp.where(chunks == 0, -1, chunks).max(-1)


def _all_segments(segments, block):
    """Smallest and largest segment of each block, padding (0) included, two [B, blocks]."""
    padded = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)), mode="edge")
    chunks = padded.reshape(padded.shape[0], -1, block)
    return chunks.min(-1), chunks.max(-1)


def _extent(blocks, axis):
    count = blocks.shape[axis]
    first = jnp.argmax(blocks, axis=axis)
    last = count - jnp.argmax(jnp.flip(blocks, axis), axis=axis)
    some = blocks.any(axis)
    return jnp.where(some, first, 0).astype(jnp.int32), jnp.where(some, last, 0).astype(jnp.int32)
