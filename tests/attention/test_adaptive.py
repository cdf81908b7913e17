"""Adaptive temperature against its formula, and at its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.adaptive import (
    ENTROPY_FROM,
    adaptive_softmax,
    adaptive_temperature,
    temperature_of_entropy,
)


def logits(scale, shape=(3, 5, 11), seed=0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def by_hand(z):
    """(weights, beta, entropy) of float64 rows, as the paper writes them."""
    p = softmax(z)
    E = -(p * np.log(p + 1e-9)).sum(axis=-1)
    beta = -0.037 * E**4 + 0.481 * E**3 - 2.3 * E**2 + 4.917 * E - 1.791
    beta = np.where(E > 0.5, np.maximum(beta, 1), 1)
    return softmax(beta[..., None] * z), beta, E


@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0, 30.0])
def test_formula(scale):
    z = logits(scale)
    weights, beta, _ = by_hand(z)
    with jax.enable_x64(True):
        np.testing.assert_allclose(adaptive_softmax(z), weights, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(adaptive_temperature(z), beta, rtol=1e-12)


def test_sharp_rows_stay_as_they_are():
    z = logits(4.0, (400, 7))
    weights, beta, entropy = by_hand(z)
    sharp = entropy <= ENTROPY_FROM
    assert 20 < sharp.sum() < 380
    with jax.enable_x64(True):
        np.testing.assert_allclose(adaptive_softmax(z)[sharp], softmax(z)[sharp], rtol=1e-12)
        assert (np.asarray(adaptive_temperature(z))[sharp] == 1).all()
    assert (beta[~sharp] > 1).any()


def test_temperature_never_blurs():
    """beta >= 1 for every entropy; the polynomial alone falls below 1 outside of about 0.7 .. 5.4."""
    entropy = jnp.linspace(0, 12, 500)
    beta = np.asarray(temperature_of_entropy(entropy))
    assert (beta >= 1).all() and beta.max() > 1.5
    assert (beta[np.asarray(entropy) > 8] == 1).all()
    assert (beta[np.asarray(entropy) <= ENTROPY_FROM] == 1).all()


def test_masked_keys_do_not_count():
    z = logits(1.0, (2, 4, 9))
    mask = np.random.default_rng(1).random((2, 4, 9)) < 0.6
    mask[0, 0] = False
    weights, beta = np.asarray(adaptive_softmax(z, mask)), np.asarray(adaptive_temperature(z, mask))
    for row in np.ndindex(2, 4):
        seen = mask[row]
        assert (weights[row][~seen] == 0).all()
        if seen.any():
            expected, expected_beta, _ = by_hand(z[row][seen])
            np.testing.assert_allclose(weights[row][seen], expected, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(beta[row], expected_beta, rtol=1e-5)
    assert (weights[0, 0] == 0).all() and beta[0, 0] == 1


def test_a_mask_may_be_shared_by_rows():
    z = logits(1.0, (2, 4, 9))
    mask = np.arange(9) < 6
    expected = adaptive_softmax(z, np.broadcast_to(mask, z.shape))
    np.testing.assert_array_equal(adaptive_softmax(z, mask[None, None]), expected)


def test_gradient_flows_through_the_temperature():
    z, cotangent = logits(1.0, (6, 7)), logits(1.0, (6, 7), seed=1)
    _, beta, _ = by_hand(z)
    assert (beta > 1.01).any()
    with jax.enable_x64(True):
        grad = jax.grad(lambda z: jnp.sum(adaptive_softmax(z) * cotangent))(jnp.asarray(z))
    step = 1e-6
    for row, column in [(0, 0), (2, 3), (5, 6)]:
        up, down = z.copy(), z.copy()
        up[row, column] += step
        down[row, column] -= step
        slope = ((by_hand(up)[0] - by_hand(down)[0]) * cotangent).sum() / (2 * step)
        np.testing.assert_allclose(grad[row, column], slope, rtol=1e-6, atol=1e-8)


def test_masked_and_empty_rows_have_finite_gradients():
    z = jnp.asarray(logits(3.0, (4, 6)), jnp.float32)
    mask = jnp.arange(6)[None] < jnp.array([0, 1, 3, 6])[:, None]
    grad = jax.grad(lambda z: jnp.sum(adaptive_softmax(z, mask) * logits(1.0, (4, 6), 1)))(z)
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[~np.asarray(mask)] == 0).all()
    assert (np.asarray(grad)[2:][np.asarray(mask)[2:]] != 0).any()


def test_infinite_and_huge_logits():
    z = np.array([[1e30, -1e30, 0.0], [50.0, 50.0, -np.inf]])
    np.testing.assert_allclose(adaptive_softmax(z), [[1, 0, 0], [0.5, 0.5, 0]])


def test_bfloat16_is_computed_in_float32():
    z = jnp.asarray(logits(1.0), jnp.bfloat16)
    weights = adaptive_softmax(z)
    assert weights.dtype == jnp.bfloat16
    exact = adaptive_softmax(z.astype(jnp.float32))
    np.testing.assert_array_equal(weights, exact.astype(jnp.bfloat16))
