"""How streaming attention is laid out for the TPU: what is static about a call, and which blocks each block visits.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K; m one of nq blocks of Bq query rows,
n one of nk blocks of Bk keys; R, C, E numbers of values per row, per key and per head.

    q [B, H, nq, Bq, D]   k [B, K, nk, Bk, D]   v [B, K, nk, Bk, Dv]   rows [B, H, nq, R, Bq]   cols [B, H, nk, C, Bk]

Blocks are an axis of their own, so any block size is a legal tile. nq and nk are filled up to multiples of what one
fetch brings (`queries_a_fetch`, `keys_a_fetch` blocks); blocks past T or S are never visited.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import masks, tiles
from kernels.forgetting.arguments import BlockSizes
from kernels.masks import Mask
from kernels.streaming.scores import DotProduct

FETCH_BYTES = 1 << 20  # of one operand in one fetch; each has two buffers
HALF = 1 << 16  # two block indices share one int32


@dataclass(frozen=True)
class Plan:
    """What is static about a call.

    score, sizes, T, S, interpret: as given; decays: add c_i - c_j to the score, c = hi + lo being in units of log 2 and
    (hi, lo) the values of rows and of keys; keys_a_fetch, queries_a_fetch: blocks one grid step brings;
    causal, window, segmented: which conditions the mask has;
    by_batch, by_head: whether blocks to visit differ between batch rows, between query heads.
    """

    score: Any
    decays: bool
    sizes: BlockSizes
    T: int
    S: int
    keys_a_fetch: int
    queries_a_fetch: int
    causal: bool
    window: int | None
    segmented: bool
    by_batch: bool
    by_head: bool
    interpret: Any

    @property
    def linear(self) -> float | None:
        """The factor of q.k if the score is linear in it: its gradient then is scaled once, at the end."""
        return self.score.scale if isinstance(self.score, DotProduct) else None

    def place(self, b, h, heads: int, block, blocks: int):
        """Where (b, h, block) stands in the flat arrays of `Visits`."""
        row = (b * heads if self.by_batch else 0) + h if self.by_head else (b if self.by_batch else 0)
        return row * blocks + block


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visits:
    """What is integer about a call, prefetched into scalar memory but for the segments.

    offset int32 [1]; limits int32 [2 B], first and end key by starts and lengths; keys, clear_keys int32
    [rows * nq]: first + HALF * end key block to visit, and of the run in which no pair is masked; queries,
    clear_queries the converse; q_segments [B, nq, 1, Bq], kv_segments [B, nk, 1, Bk] or None.
    """

    offset: jax.Array
    limits: jax.Array
    keys: jax.Array
    clear_keys: jax.Array
    queries: jax.Array
    clear_queries: jax.Array
    q_segments: jax.Array | None
    kv_segments: jax.Array | None


def choose(T: int, S: int, dtype) -> BlockSizes:
    """Blocks of at most 512 x 512 that divide the padded lengths evenly: whole tiles of 16 rows and 128 keys.

    Half of that for float32, whose products are many passes: the program would become very long.
    """
    most = 512 if dtype == jnp.bfloat16 else 256
    return BlockSizes(_even(T, most, 16), _even(S, most, 128))


def make(
    score, mask: Mask, q, k, v, sizes: BlockSizes, interpret, *, decays=False, kept=None
) -> tuple[Plan, Visits]:
    """Plan and visits of a call on public operands; `kept` bool [B, H, nq, nk] leaves out blocks (pruning)."""
    (B, T, _, D), (_, S, _, Dv) = q.shape, v.shape
    needed = masks.visible_blocks(mask, T, S, sizes.q, sizes.k)[:, None]
    clear = masks.clear_blocks(mask, T, S, sizes.q, sizes.k)[:, None]
    if kept is not None:
        needed, clear = needed & kept, clear & kept
    wide = max(D, Dv, tiles.LANES) * q.dtype.itemsize
    keys, queries = (
        _a_fetch(-(-length // size), size * wide) for length, size in ((S, sizes.k), (T, sizes.q))
    )
    plan = Plan(
        score=score, decays=decays, sizes=sizes, T=T, S=S, keys_a_fetch=keys, queries_a_fetch=queries,
        causal=mask.causal, window=mask.window, segmented=mask.q_segments is not None,
        by_batch=needed.shape[0] > 1, by_head=needed.shape[1] > 1, interpret=interpret,
    )  # fmt: skip
    return plan, _visits(plan, mask, B, needed, jnp.broadcast_to(clear, needed.shape))


def blocks(x: jax.Array, size: int, a_fetch: int) -> jax.Array:
    """[B, N, H, D] -> [B, H, n, size, D], n a multiple of a_fetch; padding repeats the last entry, where every score is
    as finite as at real ones."""
    x = tiles.pad(x, 1, tiles.multiple(x.shape[1], size * a_fetch), "edge")
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).transpose(0, 3, 1, 2, 4)


def unblock(x: jax.Array, length: int) -> jax.Array:
    """[B, H, n, size, D] -> [B, length, H, D]."""
    x = x.transpose(0, 2, 3, 1, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def vectors(values: tuple, size: int, a_fetch: int) -> jax.Array | None:
    """Values [B, N, H] each -> float32 [B, H, n, len(values), size], or None if there are none."""
    if not values:
        return None
    x = jnp.stack(values, -1).astype(jnp.float32)
    return blocks(x, size, a_fetch).swapaxes(-1, -2)


def scalar_vectors(values: tuple) -> jax.Array | None:
    """Values [H] each -> float32 [H, len(values), 128], or None if there are none."""
    if not values:
        return None
    x = jnp.stack(values, -1).astype(jnp.float32)[..., None]
    return jnp.broadcast_to(x, (*x.shape[:2], tiles.LANES))


def unpack(pair):
    """First and end of a packed pair."""
    return pair & (HALF - 1), pair >> HALF.bit_length() - 1


def clamp(j, pair, fetched: int):
    """Fetch j moved to the nearest that holds a block to visit: one that is not needed brings nothing new."""
    first, end = unpack(pair)
    return jnp.clip(j, jax.lax.div(first, fetched), jax.lax.div(jnp.maximum(end - 1, 0), fetched))


class Walk(NamedTuple):
    """The blocks of one fetch to visit: those with masked pairs, before and behind a clear run, then that run.

    first, turn, behind: where the masked ones begin, how many are before the run, and where they go on; clear:
    where the run begins; masked, total: how many are masked, and how many there are.
    """

    first: jax.Array
    turn: jax.Array
    behind: jax.Array
    clear: jax.Array
    masked: jax.Array
    total: jax.Array

    def block(self, t):
        """The block visited as number t."""
        masked = jnp.where(t < self.turn, self.first + t, self.behind + t - self.turn)
        return jnp.where(t < self.masked, masked, self.clear + t - self.masked)


def walk(visit, clear, begin, count) -> Walk:
    """Those of the blocks packed in `visit`, in which the run packed in `clear` is, that a fetch of `count` from
    `begin` on brings."""
    (first, end), (clear_first, clear_end) = unpack(visit), unpack(clear)
    low, high = jnp.maximum(first, begin), jnp.minimum(end, begin + count)
    high = jnp.maximum(low, high)
    clear_low, clear_high = jnp.clip(clear_first, low, high), jnp.clip(clear_end, low, high)
    clear_high = jnp.maximum(clear_low, clear_high)
    masked = (clear_low - low) + (high - clear_high)
    return Walk(low, clear_low - low, clear_high, clear_low, masked, masked + clear_high - clear_low)


def pipeline(walk: Walk, pieces: int, first, second, both) -> None:
    """Runs first(t, masked) and then second(t) on every piece t of the blocks of a walk, `pieces` a block.

    both(t, masked) is first(t, masked) and second(t - 1) in one stretch of code: what one waits for is hidden by the
    other, and as they exchange their tile through scratch memory, neither keeps the other's in registers.
    """
    masked, total = walk.masked * pieces, walk.total * pieces

    @pl.when(total > 0)
    def prologue():
        first(0, True)

    @pl.loop(1, jnp.maximum(masked, 1))
    def mixed_pieces(t):
        both(t, True)

    @pl.loop(jnp.maximum(masked, 1), jnp.maximum(total, 1))
    def clear_pieces(t):
        both(t, False)

    @pl.when(total > 0)
    def epilogue():
        second(total - 1)


def compiler_params(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics)


def name(plan: Plan, what: str) -> str:
    return f"{'forgetting' if plan.decays else 'streaming'}_{what}"


def cost(
    plan: Plan, batch_heads: int, operands, results, *, of_q: int, of_v: int, D: int, Dv: int
) -> pl.CostEstimate:
    """The compiler's estimate: `of_q` products over D and `of_v` over Dv for each pair below the diagonal."""
    pairs = plan.T * min(plan.S, plan.window or plan.S)
    if plan.causal and plan.window is None:
        pairs = plan.T * plan.S - plan.T * min(plan.T, plan.S) // 2
    nbytes = sum(x.size * x.dtype.itemsize for x in (*operands, *results) if x is not None)
    return pl.CostEstimate(
        flops=2 * batch_heads * pairs * (of_q * D + of_v * Dv),
        transcendentals=batch_heads * pairs,
        bytes_accessed=nbytes,
    )


def _visits(plan, mask, B, needed, clear):
    # Blocks that fill up the last fetch are visited by nobody.
    filling = [(0, -count % fetch) for count, fetch in
               zip(needed.shape[2:], (plan.queries_a_fetch, plan.keys_a_fetch), strict=True)]  # fmt: skip
    needed, clear = (jnp.pad(x, [(0, 0), (0, 0), *filling]) for x in (needed, clear))
    offset = jnp.asarray(mask.q_offset, jnp.int32).reshape(1)
    starts = jnp.zeros((B,), jnp.int32) if mask.starts is None else mask.starts.astype(jnp.int32)
    lengths = jnp.full((B,), plan.S, jnp.int32)
    if mask.lengths is not None:
        lengths = jnp.minimum(lengths, mask.lengths.astype(jnp.int32))
    q_segments = kv_segments = None
    if plan.segmented:
        q_segments = _segments(mask.q_segments, plan.sizes.q, plan.queries_a_fetch)
        kv_segments = _segments(mask.kv_segments, plan.sizes.k, plan.keys_a_fetch)
    return Visits(
        offset, jnp.stack([starts, lengths], -1).reshape(-1),
        _pack(masks.key_block_range(needed)), _pack(masks.clear_range(clear, -1)),
        _pack(masks.query_block_range(needed)), _pack(masks.clear_range(clear, -2)),
        q_segments, kv_segments,
    )  # fmt: skip


def _segments(x, size, a_fetch):
    x = tiles.pad(x.astype(jnp.int32), 1, tiles.multiple(x.shape[1], size * a_fetch))
    return x.reshape(x.shape[0], -1, 1, size)


def _pack(pair):
    first, end = pair
    return (first + HALF * end).reshape(-1)


def _a_fetch(count, block_bytes):
    """Blocks one grid step brings: as many as FETCH_BYTES hold, and as equally filled as may be."""
    most = max(1, min(count, FETCH_BYTES // block_bytes))
    return -(-count // -(-count // most))


def _even(length, target, of):
    """Smallest multiple of `of` that covers `length` in ceil(length / target) equal blocks."""
    return tiles.multiple(-(-length // -(-length // target)), of)
