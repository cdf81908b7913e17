"""What the TPU kernels of softplus attention share: reading operands of a [Bk, Bq] tile, and products of tiles."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.softplus import tiles
from kernels.softplus.fused import pad

LANES = 128
CHUNK = 256  # keys of a block computed at once
PACKED_SUBLANES = 16  # rows of a tile of bfloat16
VMEM = pltpu.VMEM


def key_column(segments: jax.Array | None, Bk: int) -> jax.Array | None:
    """Segments of keys [B, S] as columns [B, S, 1], filled up to whole blocks."""
    return None if segments is None else pad(segments, 1, Bk)[..., None]


def rows_of(names, floats, integers) -> tiles.Rows:
    """The row vectors [1, Bq] in two packed blocks, by name."""
    found = {name: floats[n : n + 1, :] for n, name in enumerate(names[0])}
    return found | {name: integers[n : n + 1, :] for n, name in enumerate(names[1])}


def chunks(Bk: int) -> list:
    """Slices of a block of keys: what is computed at once, so that most of it stays in registers."""
    size = CHUNK if Bk % CHUNK == 0 else Bk
    return [pl.ds(at, size) for at in range(0, Bk, size)]


def scores(rows, q, k, segments, at, keys):
    """s and visibility of the slice `keys` of a block that begins at key `at`: [chunk, Bq].

    q [D, Bq], k [Bk, D] and segments [Bk, 1] are references.
    """
    product = dot(k[keys], q[...], 1, 0)
    index = jax.lax.broadcasted_iota(jnp.int32, product.shape, 0)
    segments = None if segments is None else segments[keys]
    return tiles.scores(rows, product, index, at + keys.start, segments)


def dot(x: jax.Array, y: jax.Array, over_x: int, over_y: int) -> jax.Array:
    """Product over one axis of each, accumulated in float32; float32 operands keep all their digits."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (((over_x,), (over_y,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
