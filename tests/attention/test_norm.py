"""RMS norm against numpy, with weights for all heads or for each."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.norm import rms_norm

X = np.random.default_rng(0).standard_normal((2, 5, 3, 7)).astype(np.float32)


@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_against_numpy(shape):
    scale = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    want = X / np.sqrt((X.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.25) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(X), jnp.asarray(scale), 0.25), want, rtol=2e-5, atol=1e-6)


def test_half_precision_is_normalised_in_float32():
    """The mean of squares of 300 overflows float16 and loses digits in bfloat16; the result does not."""
    x = jnp.full((1, 1, 1, 7), 300.0, jnp.float16)
    y = rms_norm(x, jnp.ones(7), 1e-6)
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(y, 1.0)
