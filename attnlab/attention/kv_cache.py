"""The key/value cache of row-normalised attention, for prefill in any pieces and single steps alike.

Letters: B batch, T new tokens, S cache slots, K key/value heads, H query heads, D head size, W window.

Two layouts, chosen by `window`:
- full: slot j holds position j; a token is written at `length`. Memory O(S).
- rolling (window W < S): the slots hold the last W positions, the newest in the last slot. Memory O(W).
"""

import jax
import jax.numpy as jnp
from flax import struct

from kernels.masks import Mask

Array = jax.Array


@struct.dataclass
class KVCache:
    """key [B, S, K, D], value [B, S, K, D], log_f [B, S, H] float32 or None, starts [B] and length [] int32.

    `starts` is the number of left-padding positions of a row; `length` counts all positions seen, pads included.
    """

    key: Array
    value: Array
    log_f: Array | None
    starts: Array
    length: Array
    rolling: bool = struct.field(pytree_node=False, default=False)


def init_cache(
    batch: int, length: int, kv_heads: int, head_dim: int, dtype, *, gate_heads=0, window=None, starts=None
) -> KVCache:
    """An empty cache for `length` positions (or the last `window` of them); gate_heads > 0 adds log gates."""
    if length < 1:
        raise ValueError(f"a cache needs room for at least one position, got length={length}")
    rolling, count = window is not None and window < length, slots(length, window)
    wide = jnp.promote_types(jnp.float32, dtype)
    return KVCache(
        key=jnp.zeros((batch, count, kv_heads, head_dim), dtype),
        value=jnp.zeros((batch, count, kv_heads, head_dim), dtype),
        log_f=jnp.zeros((batch, count, gate_heads), wide) if gate_heads else None,
        starts=jnp.zeros(batch, jnp.int32) if starts is None else jnp.asarray(starts, jnp.int32),
        length=jnp.zeros((), jnp.int32),
        rolling=rolling,
    )


def slots(length: int, window: int | None) -> int:
    """How many positions a cache for `length` positions keeps."""
    return length if window is None else min(window, length)


def new_positions(cache: KVCache, count: int) -> Array:
    """Positions [B, T] of the next `count` tokens, counted from each row's first real token (pads: negative)."""
    return cache.length + jnp.arange(count, dtype=jnp.int32)[None] - cache.starts[:, None]


def extend(cache: KVCache, key: Array, value: Array, log_f: Array | None, window: int | None):
    """Append T tokens. Returns (key, value, log_f, mask) for the new queries to attend over, and the new cache.

    key and value [B, T, K, D]; log_f [B, T, H] or None.
    """
    new = {"key": key, "value": value} | ({} if log_f is None else {"log_f": log_f})
    if cache.rolling:
        seen, kept, mask = _roll(cache, new, window)
    else:
        seen, mask = _write(cache, new, window)
        kept = seen
    cache = cache.replace(**kept, length=cache.length + key.shape[1])
    return (seen["key"], seen["value"], seen.get("log_f"), mask), cache


def _write(cache: KVCache, new: dict[str, Array], window: int | None):
    def put(name, fresh):
        buffer = getattr(cache, name)
        if fresh.shape[1] > buffer.shape[1]:
            raise ValueError(
                f"{fresh.shape[1]} tokens do not fit a cache of {buffer.shape[1]} positions; make a longer cache"
            )
        return jax.lax.dynamic_update_slice_in_dim(buffer, fresh.astype(buffer.dtype), cache.length, axis=1)

    seen = {name: put(name, fresh) for name, fresh in new.items()}
    return seen, Mask(causal=True, window=window, q_offset=cache.length, starts=cache.starts)


def _roll(cache: KVCache, new: dict[str, Array], window: int | None):
    slots = cache.key.shape[1]
    seen, kept = {}, {}
    for name, fresh in new.items():
        buffer = getattr(cache, name)
        seen[name] = jnp.concatenate([buffer, fresh.astype(buffer.dtype)], axis=1)
        kept[name] = seen[name][:, -slots:]
    first = jnp.maximum(cache.starts + slots - cache.length, jnp.maximum(slots - cache.length, 0))
    return seen, kept, Mask(causal=True, window=window, q_offset=slots, starts=first)


def poison_overflow(y: Array, cache: KVCache) -> Array:
    """NaN instead of a wrong answer once more positions were seen than a full cache holds (checked on device)."""
    if cache.rolling:
        return y
    return jnp.where(cache.length > cache.key.shape[1], jnp.nan, y).astype(y.dtype)
