"""What the GPU kernels of softplus attention share: layouts, reading operands of a [Bq, Bk] tile, products of tiles."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.forgetting.arguments import BlockSizes
from kernels.softplus import tiles
from kernels.softplus.fused import pad

LEAST = 16  # of every dimension of a product


@dataclass(frozen=True)
class Shape:
    """Blocks (queries, keys) of the forward and the backward pass, and how a program is compiled.

    Attributes:
        forward, backward: the blocks.
        warps, stages: of a program.
        warps_of_keys: of a program that sums dk and dv, if others.
    """

    forward: BlockSizes
    backward: BlockSizes
    warps: int
    stages: int
    warps_of_keys: int | None = None

    @property
    def compiler_params(self):
        return plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)

    @property
    def params_of_keys(self):
        return plgpu.CompilerParams(num_warps=self.warps_of_keys or self.warps, num_stages=self.stages)


# By bytes of an operand and head size: the largest blocks that ptxas keeps in registers for sm_80 and sm_90.
SHAPES = {
    (2, 64): Shape(BlockSizes(64, 64), BlockSizes(64, 64), 4, 2),
    (2, 128): Shape(BlockSizes(64, 64), BlockSizes(64, 32), 8, 2),
    (2, 256): Shape(BlockSizes(64, 32), BlockSizes(32, 32), 8, 1),
    (4, 64): Shape(BlockSizes(64, 32), BlockSizes(32, 32), 4, 1, warps_of_keys=8),
    (4, 128): Shape(BlockSizes(16, 32), BlockSizes(16, 32), 4, 1),
    (4, 256): Shape(BlockSizes(16, 16), BlockSizes(16, 16), 8, 1),
}


def shape_for(D: int, Dv: int, dtype) -> Shape:
    """The shape for head sizes D and Dv."""
    return SHAPES[jnp.dtype(dtype).itemsize, max(64, head_size(D), head_size(Dv))]


def head_size(D: int) -> int:
    """The power of two that a head of size D is padded to."""
    return max(LEAST, pl.next_power_of_2(D))


def padded(x: jax.Array, block: int) -> jax.Array:
    """[B, T, H, D] with T filled up to whole blocks and D to a power of two."""
    return pad(pad(x, 1, block), 3, head_size(x.shape[3]))


def specs_of_rows(floats: int, integers: int, Bq: int) -> list:
    """Blocks of packed row vectors for a grid (query blocks, heads, batch)."""
    return [
        pl.BlockSpec((None, None, floats, Bq), lambda m, h, b: (b, h, 0, m)),
        pl.BlockSpec((None, integers, Bq), lambda m, h, b: (b, 0, m)),
    ]


def whole(length: int, D: int, G: int) -> pl.BlockSpec:
    """All rows of the key/value head of query head h, in [B, S, K, D]."""
    return pl.BlockSpec((None, length, None, D), lambda m, h, b: (b, 0, jax.lax.div(h, G), 0))


def rows_of(names, floats, integers, *, head=(), at=slice(None)) -> tiles.Rows:
    """The row vectors [Bq, 1] in two packed references by name; `head` and `at` index around the axis of names."""
    found = {name: floats[(*head, n, at)][:, None] for n, name in enumerate(names[0])}
    return found | {name: integers[n, at][:, None] for n, name in enumerate(names[1])}


def scores(rows, query, k, segments, at, Bk, precise):
    """s and visibility, [Bq, Bk], of queries [Bq, D] and Bk keys from `at` on; k and segments are references."""
    product = dot(query, k[pl.ds(at, Bk), :].T, precise)
    index = jax.lax.broadcasted_iota(jnp.int32, product.shape, 1)
    segments = None if segments is None else segments[pl.ds(at, Bk)][None]
    return tiles.scores(rows, product, index, at, segments)


def dot(x: jax.Array, y: jax.Array, compiled: bool) -> jax.Array:
    """x y accumulated in float32; float32 operands go through the tensor cores in three parts each."""
    precision = None
    if x.dtype == jnp.float32:
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if compiled else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        x, y, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
