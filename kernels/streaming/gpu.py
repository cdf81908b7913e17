"""Streaming attention on a GPU: Pallas kernels for Triton, forward and backward, with the score inside.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D, Dv head sizes; nq, nk blocks of queries and
keys. This file chooses tiles, fills up whole blocks, finds the blocks to visit and holds the custom VJP;
`gpu_forward.py` and `gpu_backward.py` have the kernels. `attend` also serves `kernels.forgetting`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import masks, pallas
from kernels.forgetting.arguments import BlockSizes
from kernels.masks import Mask
from kernels.streaming import gpu_backward, gpu_forward
from kernels.streaming.arguments import Arguments, Values
from kernels.streaming.gpu_tiles import Plan, Tiles, Visits, key_visits, mask_pieces, query_visits
from kernels.tiles import multiple, pad

LARGEST_HEAD = 256
BLOCKS = (16, 32, 64, 128)  # what tensor cores and registers allow


def pallas_gpu(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] in q's dtype and lse [B, T, H] float32 (-inf where no key is visible)."""
    a = arguments
    wants = jax.tree.map(lambda _: True, a.values)
    return attend("streaming", a.score, a.q, a.k, a.v, a.values, a.mask, a.block_sizes, wants=wants)


def why_unsupported(arguments: Arguments) -> str | None:
    """One sentence, or None if the kernels can run."""
    return why_not(arguments.q, arguments.v, arguments.block_sizes)


def why_not(q, v, sizes: BlockSizes | None) -> str | None:
    """What neither room's kernels can do."""
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the operands are {q.dtype}, tensor cores multiply float32, bfloat16 and float16; cast them"
    if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        return f"head sizes D={q.shape[-1]}, Dv={v.shape[-1]} do not fit on chip beyond {LARGEST_HEAD}; use more heads"
    if sizes is not None and not (sizes.q in BLOCKS and sizes.k in BLOCKS):
        return f"block_sizes q={sizes.q}, k={sizes.k} must each be one of {list(BLOCKS)}; or leave them out"
    return None


def choose(q, k, v, sizes: BlockSizes | None, rich: bool) -> dict[str, Tiles]:
    """Tiles of the three kernels, no larger than T and S need; rich: more than keys' values get gradients."""
    D = max(64, *(gpu_forward.wide(x.shape[-1]) for x in (q, v)))
    tiles = {name: Tiles(*numbers) for name, numbers in TILES[q.dtype.itemsize, rich, D].items()}
    if sizes is not None:
        return {name: dataclasses.replace(each, q=sizes.q, k=sizes.k) for name, each in tiles.items()}
    of_q, of_k = (max(BLOCKS[0], pl.next_power_of_2(x.shape[1])) for x in (q, k))
    return {
        name: dataclasses.replace(each, q=min(each.q, of_q), k=min(each.k, of_k))
        for name, each in tiles.items()
    }


# Block of queries, block of keys, warps, stages by bytes of an element, rich or not, and padded head size: the largest
# that keep everything in registers where they are compiled for compute capability 9.0, at D <= 128.
TILES = {
    (2, False, 64): {"forward": (128, 64, 8, 3), "of_queries": (128, 64, 8, 3), "of_keys": (64, 128, 8, 2)},
    (2, False, 128): {"forward": (128, 64, 8, 3), "of_queries": (64, 64, 4, 2), "of_keys": (64, 64, 8, 2)},
    (2, False, 256): {"forward": (64, 64, 8, 2), "of_queries": (64, 64, 8, 2), "of_keys": (64, 32, 8, 2)},
    (2, True, 64): {"forward": (128, 64, 8, 3), "of_queries": (64, 64, 4, 3), "of_keys": (64, 64, 8, 2)},
    (2, True, 128): {"forward": (128, 64, 8, 3), "of_queries": (128, 32, 8, 2), "of_keys": (32, 64, 8, 2)},
    (2, True, 256): {"forward": (64, 64, 8, 2), "of_queries": (32, 64, 8, 2), "of_keys": (32, 32, 8, 2)},
    (4, False, 64): {"forward": (64, 32, 4, 2), "of_queries": (64, 16, 4, 2), "of_keys": (32, 32, 8, 2)},
    (4, False, 128): {"forward": (32, 32, 8, 2), "of_queries": (16, 32, 4, 2), "of_keys": (32, 16, 8, 2)},
    (4, False, 256): {"forward": (16, 32, 8, 2), "of_queries": (16, 16, 8, 2), "of_keys": (16, 16, 8, 2)},
    (4, True, 64): {"forward": (64, 32, 4, 2), "of_queries": (32, 32, 4, 2), "of_keys": (32, 32, 8, 2)},
    (4, True, 128): {"forward": (32, 32, 8, 2), "of_queries": (16, 32, 4, 2), "of_keys": (32, 16, 8, 2)},
    (4, True, 256): {"forward": (16, 32, 8, 2), "of_queries": (16, 16, 8, 2), "of_keys": (16, 16, 8, 2)},
}


def attend(name, score, q, k, v, values: Values, mask: Mask, sizes: BlockSizes | None, *, wants, prune=None):
    """o [B, T, H, Dv] and lse [B, T, H] of any elementwise score.

    prune: function of block sizes (Bq, Bk) giving the first key block that each query block keeps, [B, H, nq].
    """
    rich = any(wants.rows + wants.extras)
    T, S, tiles = q.shape[1], k.shape[1], choose(q, k, v, sizes, rich)
    plan = Plan(
        name,
        score,
        mask.causal,
        mask.window,
        **tiles,
        wants=wants,
        interpret=pallas.interpret(),
    )
    padded = multiple(T, max(x.q for x in tiles.values())), multiple(S, max(x.k for x in tiles.values()))
    visits = _visits(mask, q, k, tiles, padded, prune)
    # Filled up with the last entry, scores are as finite there as at real rows and keys.
    q, k, v = pad(q, 1, padded[0], "edge"), pad(k, 1, padded[1], "edge"), pad(v, 1, padded[1], "edge")
    rows = tuple(pad(x.swapaxes(1, 2), 2, padded[0], "edge") for x in values.rows)
    cols = tuple(pad(x.swapaxes(1, 2), 2, padded[1], "edge") for x in values.cols)
    o, lse = _attend(plan, q, k, v, Values(rows, cols, values.extras), visits)
    return o[:, :T], lse[:, :, :T].swapaxes(1, 2)


def _visits(mask, q, k, tiles, padded, prune):
    """The blocks each kernel has to visit, and the mask in pieces."""
    (B, T, H, _), S = q.shape, k.shape[1]
    # Pruning goes by the largest tiles, which the others divide: all three kernels leave out the same pairs.
    unit = max(x.q for x in tiles.values()), max(x.k for x in tiles.values())
    start = None if prune is None else prune(*unit)

    def find(tiles, ranges):
        counts = padded[0] // tiles.q, padded[1] // tiles.k
        needed, clear = (
            blocks(mask, T, S, tiles.q, tiles.k)[:, None]
            for blocks in (masks.visible_blocks, masks.clear_blocks)
        )
        if start is not None:
            rows, cols = (jnp.arange(n) for n in needed.shape[2:])
            needed = needed & (cols * tiles.k // unit[1] >= start[:, :, rows * tiles.q // unit[0], None])
        grow = [(0, 0), (0, 0), *((0, n - have) for n, have in zip(counts, needed.shape[2:], strict=True))]
        found = ranges(jnp.pad(needed, grow), jnp.pad(jnp.broadcast_to(clear, needed.shape), grow))
        return jnp.broadcast_to(found, (B, H, *found.shape[2:]))

    return Visits(
        mask_pieces(mask, B, S, padded),
        find(tiles["forward"], key_visits),
        find(tiles["of_queries"], key_visits),
        find(tiles["of_keys"], query_visits),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, values, visits):
    return gpu_forward.forward(plan, q, k, v, values, visits)


def _forward(plan, q, k, v, values, visits):
    o, lse = gpu_forward.forward(plan, q, k, v, values, visits)
    return (o, lse), (q, k, v, values, visits, o, lse)


def _backward(plan, residuals, cotangents):
    q, k, v, values, visits, o, lse = residuals
    do, dlse = cotangents
    some = lse > -jnp.inf
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - jnp.where(some, dlse, 0)
    finite = jnp.where(some, lse, 0)
    return *gpu_backward.backward(plan, q, k, v, values, visits, finite, delta, do), None


_attend.defvjp(_forward, _backward)
