"""Rotary embedding by hand, and that only differences of positions count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.rotary import rotate


def test_by_hand_in_the_half_split_layout():
    """Channels 0 and 2 turn by the position itself, channels 1 and 3 by a tenth of it (theta 100, D 4)."""
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    fast, slow = 2.0, 0.2
    want = [
        np.cos(fast) - 3 * np.sin(fast),
        2 * np.cos(slow) - 4 * np.sin(slow),
        3 * np.cos(fast) + np.sin(fast),
        4 * np.cos(slow) + 2 * np.sin(slow),
    ]
    np.testing.assert_allclose(rotate(x, jnp.array([[2]]), 100.0)[0, 0, 0], want, rtol=1e-5)


def test_products_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 3, 10))

    def product(i, j):
        turned = rotate(q, jnp.array([[i]]), 1e4), rotate(k, jnp.array([[j]]), 1e4)
        return np.sum(turned[0] * turned[1], axis=-1)

    np.testing.assert_allclose(product(7, 3), product(104, 100), rtol=1e-4, atol=1e-4)
    assert np.abs(product(7, 3) - product(7, 4)).max() > 1e-2


def test_dtype_stays_and_odd_heads_are_refused():
    x = jnp.ones((1, 2, 3, 6), jnp.bfloat16)
    assert rotate(x, jnp.arange(2)[None], 1e4).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="even head size, got 5"):
        rotate(jnp.ones((1, 2, 3, 5)), jnp.arange(2)[None], 1e4)
