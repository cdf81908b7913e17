"""The dense definition of streaming attention: the contract, and numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.streaming import DotProduct, Mask, streaming_attention
from tests.kernels.streaming.contract import CASES, StreamingContract


class TestReference(StreamingContract):
    """It is the definition, so float32 against float64 of a few cases is enough."""

    implementation = "reference"
    cases = {name: CASES[name] for name in ("traced_chunk_with_empty_rows", "all_keys")}


def test_two_keys_by_hand():
    """Scores ln 3 and 0: weights 3/4 and 1/4, lse = ln 4."""
    q, k, v = jnp.array([[[[np.log(3.0)]]]]), jnp.array([[[[1.0]], [[0.0]]]]), jnp.array([[[[8.0]], [[4.0]]]])
    o, lse = streaming_attention(
        DotProduct(1.0), q, k, v, mask=Mask(causal=False), return_lse=True, implementation="reference"
    )
    np.testing.assert_allclose(o[0, 0, 0, 0], 7.0, rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0, 0], np.log(4.0), rtol=1e-6)


def test_rows_and_columns_are_absolute_positions():
    """With the score -100 |i - 2 - j| a query at position a takes the value of key a - 2."""

    def two_back(x, rows, cols, of_rows, of_cols, extras):
        return -100.0 * jnp.abs(rows - 2 - cols).astype(x.dtype)

    q, k, v = jnp.ones((1, 3, 1, 1)), jnp.ones((1, 9, 1, 1)), jnp.arange(9.0).reshape(1, 9, 1, 1)
    for implementation in ("reference", "blockwise"):
        options = {"mask": Mask(q_offset=5), "implementation": implementation}
        o = jax.jit(functools.partial(streaming_attention, two_back, **options))(q, k, v)
        np.testing.assert_allclose(o[0, :, 0, 0], [3, 4, 5], atol=1e-6)
