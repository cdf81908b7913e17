"""The dense form of softplus attention: the contract, and the paper's own order of operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import masks
from kernels.softplus import Mask, softplus_attention, softplus_weights
from tests.kernels.softplus.contract import CASES, SoftplusContract


class TestReference(SoftplusContract):
    implementation = "reference"
    cases = {name: CASES[name] for name in ("decode", "segments")}


def as_the_paper_writes_it(q, k, v, p, seen):
    """Equations 4 and 5, row by row: l1 norm, times n, minus O, relu, power, l1 norm. One head, float64."""
    out = np.zeros((q.shape[0], v.shape[1]))
    for i, visible in enumerate(seen):
        n = visible.sum()
        if n == 0:
            continue
        s = np.log(q.shape[1]) * np.log(n) * (k[visible] @ q[i])
        P = np.log1p(np.exp(s)) / np.log1p(np.exp(s)).sum()
        w = P if p is None else np.maximum(n * P - (n > 3), 0) ** p
        out[i] = w @ v[visible] / w.sum()
    return out


@pytest.mark.parametrize(
    ("p", "mask"),
    [
        (None, {"window": 5}),
        (1, {"causal": False, "lengths": np.array([13])}),
        (3, {"q_offset": 4}),
        (15, {}),
    ],
)
def test_the_mean_threshold_is_the_papers_two_norms(p, mask):
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(17, 7)), rng.normal(size=(21, 7)), rng.normal(size=(21, 3))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    with jax.enable_x64(True):
        mask = Mask(**mask)
        seen = np.asarray(masks.dense(mask, 17, 21))[0]
        want = as_the_paper_writes_it(q, k, v, p, seen)
        attend = jax.jit(lambda *x: softplus_attention(*x, None, p, mask=mask, implementation="reference"))
        got = attend(*(x[None, :, None] for x in (q, k, v)))
    np.testing.assert_allclose(got[0, :, 0], want, atol=1e-12, rtol=0)


def test_weights_sum_to_one_over_visible_keys_and_times_values_are_the_output():
    contract, case = TestReference(), CASES["segments"]
    x = contract.draw(case, np.float32)
    mask = contract.mask(case)
    R, statistics = jax.jit(lambda q, k, gain: softplus_weights(q, k, gain, 15.0, mask=mask))(
        x["q"], x["k"], x["gain"]
    )
    seen = np.broadcast_to(masks.dense(mask, 63, 63)[:, None], R.shape)
    assert np.all(R >= 0) and np.all(np.asarray(R)[~seen] == 0)
    np.testing.assert_allclose(R.sum(-1), seen.any(-1), atol=1e-6)
    o, again = jax.jit(
        lambda q, k, v, gain: softplus_attention(q, k, v, gain, 15.0, mask=mask, return_statistics=True)
    )(**x)
    of_weights = jnp.einsum("bhts,bshd->bthd", R, jnp.repeat(x["v"], 2, axis=2))
    np.testing.assert_allclose(o, of_weights, atol=1e-5)
    for name, a, b in zip(statistics._fields, statistics, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=name)
