"""What the GPU kernels of streaming attention share: their plan, the blocks to visit, products, masks, the score.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D, Dv head sizes; m one of nq blocks
of Bq rows, n one of nk blocks of Bk keys.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import masks
from kernels.masks import Mask
from kernels.streaming.arguments import Score, Values

EXACT = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3  # float32 products of three parts, on tensor cores


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel, the warps of a program and the stages of its pipeline."""

    q: int
    k: int
    warps: int
    stages: int

    @property
    def params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)


@dataclass(frozen=True)
class Plan:
    """All that is static about a call.

    Attributes:
        name: what the kernels are called.
        score: as in `streaming_attention`; the kernels of keys call it with all shapes transposed.
        causal, window: of the mask.
        forward, of_queries, of_keys: tiles of the three kernels: o; dq; dk and dv.
        wants: which of the values get a gradient, as `Values` of bools; the others get zeros.
        interpret: of `pallas_call`.
    """

    name: str
    score: Score
    causal: bool
    window: int | None
    forward: Tiles
    of_queries: Tiles
    of_keys: Tiles
    wants: Values
    interpret: Any

    def call(self, kernel, tiles: Tiles, **options):
        """`pl.pallas_call` of one of the kernels."""
        return pl.pallas_call(
            partial(kernel, self), compiler_params=tiles.params, interpret=self.interpret, **options
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visits:
    """What is integer about a call: the mask in pieces, and the blocks to visit of each kernel.

    mask: by name, of those that are set: offset [1]; starts, lengths [B]; q_segments [B, T], kv_segments [B, S].
    forward, of_queries: int32 [B, H, nq, 4], first and end key block of a query block and in between first and end of
    those where every pair is visible, in this order along the keys; of_keys: int32 [B, H, nk, 4], the converse.
    """

    mask: dict[str, jax.Array]
    forward: jax.Array
    of_queries: jax.Array
    of_keys: jax.Array


def key_visits(needed: jax.Array, clear: jax.Array) -> jax.Array:
    """int32 [..., nq, 4] from needed and clear blocks, bool [..., nq, nk]; if none is clear the middle is the start."""
    first, end = masks.key_block_range(needed)
    low, high = masks.clear_range(needed & clear, axis=-1)
    low = jnp.clip(low, first, end)
    return jnp.stack([first, low, jnp.clip(high, low, end), end], axis=-1)


def query_visits(needed: jax.Array, clear: jax.Array) -> jax.Array:
    """int32 [..., nk, 4] likewise along the queries; if none is clear the middle is the end."""
    first, end = masks.query_block_range(needed)
    low, high = masks.clear_range(needed & clear, axis=-2)
    low = jnp.where(high > 0, jnp.clip(low, first, end), end)
    return jnp.stack([first, low, jnp.clip(high, low, end), end], axis=-1)


def sweep(visits, body, carry, *, left: bool, right: bool):
    """body(masked, index, carry) over the visited blocks; `left`, `right`: there may be masked ones on that side."""
    first, low, high, end = visits
    if right:
        carry = jax.lax.fori_loop(high, end, partial(body, True), carry)
    carry = jax.lax.fori_loop(low, high, partial(body, False), carry)
    return jax.lax.fori_loop(first, low, partial(body, True), carry) if left else carry


def load(ref, start, size: int, D: int, *head) -> jax.Array:
    """Rows start .. start + size of ref [N, (heads,) padded D], columns past D zero."""
    rows = ref.at[(pl.ds(start, size), *head, slice(None))]
    if ref.shape[-1] == D:
        return rows[...]
    return plgpu.load(rows, mask=(jnp.arange(ref.shape[-1]) < D)[None, :], other=0.0)


def store(ref, x: jax.Array, D: int) -> None:
    """Writes x [N, padded D] to ref, columns past D left out."""
    if ref.shape[-1] == D:
        ref[...] = x.astype(ref.dtype)
    else:
        plgpu.store(ref.at[:, :], x.astype(ref.dtype), mask=(jnp.arange(ref.shape[-1]) < D)[None, :])


def dot(plan: Plan, x: jax.Array, y: jax.Array, axis: int = 0) -> jax.Array:
    """x [N, D] times y [D, M], or with axis=1 times y [M, D] transposed: float32 sums of exact products."""
    precision = jax.lax.Precision.DEFAULT
    if x.dtype == jnp.float32:
        precision = EXACT if plan.interpret is False else jax.lax.Precision.HIGHEST
    dimensions = ((1,), (axis,)), ((), ())
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def visible(plan: Plan, mask: dict, rows: jax.Array, cols: jax.Array, of_rows, of_cols) -> jax.Array:
    """Visibility of keys `cols` to positions `rows`, one a column and one a row or the converse.

    of_rows and of_cols are their segments, or None.
    """
    seen = cols <= rows if plan.causal else (rows == rows) & (cols == cols)
    if plan.window is not None:
        seen &= rows - cols < plan.window
    if "starts" in mask:
        seen &= cols >= mask["starts"][0]
    if "lengths" in mask:
        seen &= cols < mask["lengths"][0]
    if of_rows is not None:
        seen &= (of_rows == of_cols) & (of_cols != 0)
    return seen


def mask_pieces(mask: Mask, B: int, S: int, padded: tuple[int, int]) -> dict[str, jax.Array]:
    """`Visits.mask` for T and S filled up to `padded`; filled-up keys are visible to nobody."""
    offset = jnp.asarray(mask.q_offset, jnp.int32).reshape(1)
    pieces = {"offset": offset, "starts": mask.starts, "lengths": mask.lengths}
    if padded[1] != S:
        lengths = S if mask.lengths is None else jnp.minimum(mask.lengths, S)
        pieces["lengths"] = jnp.broadcast_to(lengths, (B,))
    if mask.q_segments is not None:
        sides = zip(("q_segments", "kv_segments"), (mask.q_segments, mask.kv_segments), padded, strict=True)
        pieces |= {name: jnp.pad(x, ((0, 0), (0, N - x.shape[1]))) for name, x, N in sides}
    return {name: x.astype(jnp.int32) for name, x in pieces.items() if x is not None}


def sides(plan: Plan, mask: dict, along_keys: bool) -> dict[str, bool]:
    """On which sides of the clear blocks masked ones may be visited; see `sweep`, `key_visits` and `query_visits`."""
    moving = plan.window is not None or "q_segments" in mask
    if along_keys:
        return {"left": moving or "starts" in mask, "right": plan.causal or moving or len(mask) > 1}
    return {"left": plan.causal or moving or len(mask) > 1, "right": moving}
