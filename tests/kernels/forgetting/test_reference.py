"""The dense reference against the contract, and against a triple loop written from the definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.forgetting.contract import CASES, Contract, assert_near, attend, jit, operands


class TestReference(Contract):
    implementation = "reference"


def by_loops(case, arrays):
    """o and lse straight from the definition, one pair at a time (without pruning)."""
    q, k, v, log_f = arrays
    if log_f is not None:
        real = np.array([[is_real(case.mask, b, l) for l in range(case.S)] for b in range(case.B)])
        log_f = np.where(real[:, :, None], log_f, 0)
    o, lse = np.zeros((case.B, case.T, case.H, case.Dv)), np.full((case.B, case.T, case.H), -np.inf)
    for b, i, h in np.ndindex(case.B, case.T, case.H):
        scores = {j: score(case, q, k, log_f, b, i, j, h) for j in range(case.S) if sees(case.mask, b, i, j)}
        if scores:
            lse[b, i, h] = np.logaddexp.reduce(list(scores.values()))
            o[b, i, h] = sum(
                np.exp(s - lse[b, i, h]) * v[b, j, h * case.K // case.H] for j, s in scores.items()
            )
    return o, lse


def score(case, q, k, log_f, b, i, j, h):
    a = case.mask.get("q_offset", 0) + i
    scale = case.options.get("scale", case.D**-0.5)
    decay = 0.0 if log_f is None else sum(log_f[b, l, h] for l in range(j + 1, a + 1))
    return scale * q[b, i, h] @ k[b, j, h * case.K // case.H] + decay


def is_real(mask, b, j):
    """Key j of row b is neither padding nor past the filled part; other gates count as 0."""
    lengths = mask.get("lengths", 10**9)
    length = lengths if np.ndim(lengths) == 0 else lengths[b]
    start = mask["starts"][b] if "starts" in mask else 0
    return start <= j < length and (mask["kv_segments"][b, j] != 0 if "kv_segments" in mask else True)


def sees(mask, b, i, j):
    a = mask.get("q_offset", 0) + i
    same = mask["q_segments"][b, i] == mask["kv_segments"][b, j] if "q_segments" in mask else True
    return (
        (j <= a or not mask.get("causal", True))
        and a - j < mask.get("window", np.inf)
        and same
        and is_real(mask, b, j)
    )


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("pruned", "default_blocks")])
def test_definition(name):
    case = CASES[name]
    arrays, _ = operands(case)
    with jax.enable_x64(True):
        o, lse = jit(lambda a: attend(case, "reference", a))(arrays)
        expected_o, expected_lse = by_loops(case, arrays)
        assert_near(o, expected_o, 1e-12, "o")
        assert_near(lse, expected_lse, 1e-12, "lse")


def test_gradients_are_finite_differences():
    case = CASES["segments"]
    arrays, (do, dlse) = operands(case)
    r = np.random.default_rng(1)
    seen = np.asarray(case.mask["q_segments"])[:, :, None] != 0
    with jax.enable_x64(True):

        def loss(arrays):
            o, lse = attend(case, "reference", arrays)
            return (o * do).sum() + jnp.where(seen, lse * dlse, 0).sum()

        compiled = jit(loss)
        gradients = jit(jax.grad(loss))(arrays)
        for n, name in enumerate(("q", "k", "v", "log_f")):
            direction = r.normal(size=arrays[n].shape)
            moved = [[*arrays[:n], arrays[n] + step * direction, *arrays[n + 1 :]] for step in (1e-5, -1e-5)]
            numeric = (compiled(moved[0]) - compiled(moved[1])) / 2e-5
            np.testing.assert_allclose((gradients[n] * direction).sum(), numeric, rtol=1e-6, err_msg=name)
