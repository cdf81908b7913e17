"""Keys in pieces: partial sums of any split join to the unsplit operator."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels import masks
from kernels.softplus import Mask, softplus_attention
from kernels.softplus.splits import (
    finish_first,
    finish_second,
    first_sums,
    join_first,
    join_second,
    second_sums,
)


def joined(q, k, v, mask, cuts):
    """LSSA and two settings of LSSAR from the pieces between the cuts, each with the unsplit operator."""
    (B, T, H, D), S = q.shape, k.shape[1]
    visible = jnp.broadcast_to(masks.dense(mask, T, S), (B, T, S))
    n = visible.sum(-1).astype(q.dtype)
    c = jnp.broadcast_to(math.log(D) * jnp.log(jnp.maximum(n, 1))[..., None], (B, T, H))
    pieces = [(q, k[:, a:b], v[:, a:b], c, visible[:, :, a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    whole = join_first(*(first_sums(*piece) for piece in pieces))
    pairs = [(finish_first(whole), softplus_attention(q, k, v, mask=mask, implementation="reference"))]
    for options in ({"power": 15.0}, {"power": 3.0, "offset": 0.5, "warm_rows": 0}):
        parts = join_second(*(second_sums(*piece, whole, n, **options) for piece in pieces))
        want = softplus_attention(q, k, v, mask=mask, implementation="reference", **options)
        pairs.append((finish_second(parts), want))
    return pairs


def test_pieces_join_to_the_whole():
    r = np.random.default_rng(0)
    q, k, v = r.normal(size=(2, 3, 6, 7)), r.normal(size=(2, 37, 2, 7)), r.normal(size=(2, 37, 2, 5))
    # Row 0 of batch row 1 sees nothing, the next ones are warm; the third piece is invisible there.
    mask = Mask(q_offset=30, starts=jnp.array([0, 31]))
    with jax.enable_x64(True):
        for got, want in jax.jit(lambda *x: joined(*x, mask, (0, 5, 6, 30, 37)))(q, k, v):
            np.testing.assert_allclose(got, want, atol=1e-13)
            assert np.all(np.asarray(want)[0] != 0) and np.all(np.asarray(want)[1, 0] == 0)
