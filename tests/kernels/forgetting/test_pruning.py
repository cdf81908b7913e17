"""Adaptive computation pruning: the two index sets, the bound it promises, and how far it may move results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting import (
    BlockSizes,
    Mask,
    acp_delta,
    acp_end,
    acp_start,
    acp_visited_fraction,
    forgetting_attention,
)
from kernels.forgetting.pruning import kept_blocks, kept_pairs
from tests.kernels.forgetting.contract import jit

T, S, SIZES = 64, 80, BlockSizes(8, 16)
OFFSET = S - T


def drawn(heads=2):
    r = np.random.default_rng(0)
    q, k, v = (r.normal(size=(2, n, heads, 8)).astype(np.float32) for n in (T, S, S))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    return q, k, v, -np.log1p(np.exp(-r.normal(0, 1, size=(2, S, heads)))).astype(np.float32)


@pytest.mark.parametrize("delta", [-1.0, -9.0, -40.0])
def test_both_index_sets_are_the_same_blocks(delta):
    log_f = drawn()[3]
    start = acp_start(log_f, jnp.full((2, 2), delta), OFFSET, T, 8, 16)
    nq, nk = T // 8, S // 16
    from_start = kept_blocks(start, nk)
    from_end = np.arange(nq)[:, None] < np.asarray(acp_end(start, nk))[:, :, None, :]
    np.testing.assert_array_equal(from_start, from_end)
    c = np.cumsum(log_f.astype(np.float64), axis=1)
    first, last = OFFSET + np.arange(nq) * 8, np.arange(nk) * 16 + 15
    expected = c[:, first][:, :, None] - c[:, last][:, None] >= delta
    np.testing.assert_array_equal(from_start, np.moveaxis(expected, -1, 1))
    assert not from_start.all()


def test_pruned_weight_and_output_stay_within_the_bound():
    q, k, v, log_f = drawn()
    mask, tolerance = Mask(q_offset=OFFSET), -2.0
    delta = acp_delta("auto", q, k, scale=1.0, tolerance=tolerance)
    start = acp_start(log_f, delta, OFFSET, T, 8, 16)
    assert start.max() > 0

    def run(**options):
        return jit(lambda *a: forgetting_attention(*a, mask=mask, scale=1.0, block_sizes=SIZES, return_lse=True,
                                                   implementation="reference", **options))(q, k, v, log_f)  # fmt: skip

    full, lse = run()
    pruned, kept_lse = run(acp_threshold="auto", log_pruning_tolerance=tolerance)
    epsilon = np.exp(tolerance)
    assert np.all(1 - np.exp(kept_lse - lse) <= epsilon) and np.any(kept_lse < lse)
    assert np.abs(full - pruned).max() <= 2 * epsilon * np.abs(v).max()


def test_gradients_move_little_and_minus_infinity_moves_nothing():
    q, k, v, log_f = drawn()

    @jit
    def gradients(threshold):
        def loss(*arrays):
            return (forgetting_attention(*arrays, mask=Mask(q_offset=OFFSET), block_sizes=SIZES,
                                         acp_threshold=threshold) ** 2).sum()  # fmt: skip

        return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, log_f)

    plain, never, safe = gradients(None), gradients(-jnp.inf), gradients(jnp.float32(-14.0))
    for x, y, z in zip(plain, never, safe, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
        assert np.abs(x - z).max() < 1e-3


def test_visited_fraction_grows_as_the_threshold_falls():
    log_f = drawn()[3]
    fractions = []
    for delta in (-0.5, -3.0, -9.0, -30.0, -np.inf):
        start = acp_start(log_f, jnp.full((2, 2), delta), OFFSET, T, 8, 16)
        fractions.append(np.asarray(acp_visited_fraction(start, Mask(q_offset=OFFSET), T, S, 8, 16)))
    assert (
        np.all(np.diff(fractions, axis=0) >= 0) and np.all(fractions[-1] == 1) and np.all(fractions[0] < 0.5)
    )


def test_positive_thresholds_are_clamped_so_that_the_diagonal_stays():
    q, k, v, log_f = drawn()
    options = {"mask": Mask(q_offset=OFFSET), "block_sizes": SIZES, "acp_threshold": 5.0}
    o = jit(lambda *a: forgetting_attention(*a, **options))(q, k, v, log_f)
    assert np.all(np.asarray(o) != 0)
    start = acp_start(log_f, acp_delta(5.0, q, k, scale=1.0), OFFSET, T, 8, 16)
    positions = OFFSET + np.arange(T)
    assert np.all(kept_pairs(start, T, S, 8, 16)[:, :, np.arange(T), positions])


def test_long_rows_of_normed_heads_keep_less_than_a_third():
    length, D = 2048, 16
    r = np.random.default_rng(0)
    q, k, v = (r.normal(size=(1, length, 1, D)).astype(np.float32) for _ in range(3))
    q, k = (x * np.sqrt(D) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    log_f = -np.log1p(np.exp(-r.normal(0, 1, size=(1, length, 1)))).astype(np.float32)
    start = acp_start(log_f, acp_delta("auto", q, k, scale=D**-0.5), 0, length, 128, 128)
    assert acp_visited_fraction(start, Mask(), length, length, 128, 128).max() <= 0.3
    full, pruned = (
        jit(lambda *a, t=t: forgetting_attention(*a, acp_threshold=t))(q, k, v, log_f) for t in (None, "auto")
    )
    assert np.abs(full - pruned).max() < 1e-5


def test_errors():
    q, k, v, log_f = drawn()
    with pytest.raises(ValueError, match="acp_threshold='fast' is unknown"):
        forgetting_attention(q, q, q, log_f[:, :T], acp_threshold="fast")
    with pytest.raises(ValueError, match=r"shape \(3,\) does not broadcast to \[B, H\] = \(2, 2\)"):
        forgetting_attention(q, q, q, log_f[:, :T], acp_threshold=np.zeros(3))
    with pytest.raises(ValueError, match="log_pruning_tolerance=1.0 must be at most 0"):
        forgetting_attention(q, q, q, log_f[:, :T], acp_threshold="auto", log_pruning_tolerance=1.0)
    with pytest.raises(ValueError, match="needs log_f"):
        forgetting_attention(q, k, v, acp_threshold="auto")
