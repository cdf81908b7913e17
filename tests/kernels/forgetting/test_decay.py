"""Sums of log gates: exact where differences of cumulative sums are not, and isolated runs in the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting import decay


@pytest.mark.parametrize("N", [1, 31, 32, 33, 1100])
@pytest.mark.parametrize("exclusive", [False, True])
def test_suffix_sum(N, exclusive):
    x = np.random.default_rng(0).normal(size=(3, N)).astype(np.float32)
    expected = np.cumsum(x[:, ::-1].astype(np.float64), axis=1)[:, ::-1] - (x if exclusive else 0)
    np.testing.assert_allclose(decay.suffix_sum(jnp.asarray(x), exclusive=exclusive), expected, atol=2e-5)


@pytest.mark.smoke
def test_near_sums_are_exact_behind_huge_gates():
    """A sum that starts at the row never meets the gates before the key, however large."""
    x = np.full((1, 100), -0.5, np.float32)
    x[0, ::10] = -1e6
    x[0, 60:] = -0.5
    near = decay.suffix_sum(jnp.asarray(x), exclusive=True)[0, 60:]
    np.testing.assert_array_equal(near, -0.5 * np.arange(39, -1, -1))


@pytest.mark.parametrize("offset", [0, 3, 24, 40, -5])
@pytest.mark.parametrize("mode", ["local", "global"])
def test_blocks_are_the_sums_of_the_definition(offset, mode):
    Bq, Bk, nq, G = 8, 12, 3, 2
    r = np.random.default_rng(0)
    log_f = -np.abs(r.normal(size=(G, 48))).astype(np.float32)
    sums = decay.prepare(jnp.asarray(log_f), offset, nq, Bq, Bk, mode)
    for m in range(nq):
        positions = offset + m * Bq + np.arange(Bq)
        for n in range(48 // Bk):
            keys = n * Bk + np.arange(Bk)
            block = sums.block(m, n, jnp.asarray(positions), diagonal=bool(keys[-1] > positions[0]))
            for i, j in np.ndindex(Bq, Bk):
                if keys[j] <= positions[i]:
                    expected = log_f[:, keys[j] + 1 : positions[i] + 1].sum(1)
                    np.testing.assert_allclose(block[:, i, j], expected, atol=2e-5, err_msg=f"{m, n, i, j}")


def test_gate_gradient_stays_in_its_run():
    runs = np.searchsorted(
        [20, 31, 64, 70, 96, 141], np.arange(150), side="right"
    )  # some begin a chunk of 32
    dc = np.random.default_rng(0).normal(size=(2, 150)).astype(np.float32)
    same = (runs[:, None] == runs) & np.tri(150, dtype=bool)
    expected = dc.astype(np.float64) @ same
    np.testing.assert_allclose(decay.gate_gradient(jnp.asarray(dc), jnp.asarray(runs)), expected, atol=1e-5)
    only = np.where(runs == 3, dc, 0)
    outside = jax.jit(decay.gate_gradient)(jnp.asarray(only), jnp.asarray(runs))[:, runs != 3]
    assert np.all(np.asarray(outside) == 0)
    np.testing.assert_allclose(
        decay.gate_gradient(jnp.asarray(dc), None), dc.astype(np.float64) @ np.tri(150), atol=2e-5
    )
