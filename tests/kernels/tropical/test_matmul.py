"""The max-plus matrix product: algebra, ties, gradients, shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.tropical import maxplus_matmul

IMPLEMENTATIONS = ("blockwise", "reference")


def integers(*shape, seed=0, low=-3, high=4):
    return np.random.default_rng(seed).integers(low, high, size=shape).astype(np.float32)


def brute(a, b):
    """Value and lowest winning index by plain loops."""
    sums = a[..., :, :, None].astype(np.float64) + b[..., None, :, :]
    winner = np.argmax(sums, axis=-2)
    value = np.take_along_axis(sums, winner[..., None, :], axis=-2)[..., 0, :]
    return value, np.where(value == -np.inf, -1, winner)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("a", "b"),
    [((5, 7), (7, 3)), ((2, 3, 5, 13), (13, 4)), ((3, 1, 4, 9), (5, 9, 2)), ((7,) * 3, (7,) * 3), ((1, 1), (1, 1))],
)  # fmt: skip
def test_values_winners_and_gradients_of_ties_go_to_the_lowest_index(implementation, a, b):
    a, b = integers(*a), integers(*b, seed=1)
    a[..., 0, :] = -np.inf  # a row of the semiring's zeros
    value, winner = brute(a, b)
    (c, j), pull = jax.vjp(
        lambda a, b: maxplus_matmul(a, b, return_winners=True, implementation=implementation), a, b
    )
    np.testing.assert_array_equal(c, value)
    np.testing.assert_array_equal(j, winner)
    g = np.where(winner >= 0, integers(*c.shape, seed=2, low=1), 0)
    da, db = pull((jnp.asarray(g, jnp.float32), np.zeros(j.shape, jax.dtypes.float0)))
    won = (winner[..., None, :] == np.arange(a.shape[-1])[:, None]) * g[..., None, :]  # [..., M, K, N]
    for found, dense, like in ((da, won.sum(-1), a), (db, won.sum(-3), b)):
        dense = dense.sum(tuple(range(dense.ndim - like.ndim)))
        axes = tuple(n for n, size in enumerate(like.shape) if size == 1 and dense.shape[n] > 1)
        np.testing.assert_array_equal(found, dense.sum(axes, keepdims=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_associative_and_has_an_identity(implementation):
    product = jax.jit(lambda a, b: maxplus_matmul(a, b, implementation=implementation))
    a, b, c = integers(5, 7), integers(7, 11, seed=1), integers(11, 3, seed=2)
    np.testing.assert_array_equal(product(product(a, b), c), product(a, product(b, c)))
    identity = np.where(np.eye(7, dtype=bool), 0, -np.inf).astype(np.float32)
    np.testing.assert_array_equal(product(a, identity), a)


def test_both_implementations_agree_to_the_bit_and_keep_dtypes_and_nan():
    a, b = (
        np.random.default_rng(n).normal(size=s).astype(np.float32)
        for n, s in ((0, (2, 37, 19)), (1, (2, 19, 23)))
    )
    results = [maxplus_matmul(a, b, return_winners=True, implementation=name) for name in IMPLEMENTATIONS]
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)
    assert maxplus_matmul(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)).dtype == jnp.bfloat16
    a[0, 3, 5] = np.nan
    for name in IMPLEMENTATIONS:
        assert np.array_equal(
            np.isnan(maxplus_matmul(a, b, implementation=name)).any(-1), np.isnan(a).any(-1)
        )


def test_longest_paths_by_repeated_squaring():
    """Powers of a weight matrix are the best paths of so many steps (the paper's reason for the semiring)."""
    weights = integers(9, 9, low=-9, high=0)
    weights = np.where(np.eye(9, dtype=bool), 0, weights)
    best, distance = weights, weights.copy()
    for _ in range(4):
        best = maxplus_matmul(best, best)
    for k in range(9):
        distance = np.maximum(distance, distance[:, k : k + 1] + distance[k : k + 1])
    np.testing.assert_array_equal(best, distance)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((2, 3), (4, 2), "expected Float"),
        ((2, 3, 4), (5, 4, 2), "do not broadcast"),
        ((0, 3), (3, 2), "every dimension must be at least 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        maxplus_matmul(jnp.zeros(a), jnp.zeros(b))


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation='abacus' does not exist"):
        maxplus_matmul(jnp.zeros((2, 2)), jnp.zeros((2, 2)), implementation="abacus")
