"""n_i of every kind of mask against the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import masks
from kernels.masks import Mask
from kernels.softplus import visible_counts

T, S = 13, 29


def segments(seed):
    """Numbers in no order, with padding between them, for queries and keys."""
    return jnp.asarray(np.random.default_rng(seed).choice([0, 7, -3, 2**31 - 1, 4], size=(2, S)), jnp.int32)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"window": 6},
        {"starts": jnp.array([4, 29])},
        {"causal": False, "lengths": jnp.array([11, 0])},
        {"segmented": True, "window": 11, "starts": jnp.array([0, 9]), "lengths": jnp.array([29, 25])},
        {"segmented": True, "causal": False},
    ],
)
def test_counts_are_the_rows_of_the_dense_mask(fields):
    fields = dict(fields)
    if fields.pop("segmented", False):
        fields |= {"q_segments": segments(1)[:, :T], "kv_segments": segments(2)}
    count = jax.jit(lambda offset: visible_counts(Mask(q_offset=offset, **fields), T, S))
    dense = jax.jit(lambda offset: masks.dense(Mask(q_offset=offset, **fields), T, S).sum(-1))
    for offset in (-3, 0, 16, 40):
        got = count(offset)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, dense(offset), f"{offset=}")
