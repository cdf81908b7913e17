"""The dense form: the contract, and the equations by loops over single numbers."""

import jax.numpy as jnp
import numpy as np

from kernels.linear import linear_attention
from kernels.masks import Mask
from tests.kernels.linear.contract import CASES, Contract


class TestReference(Contract):
    implementation = "reference"
    cases = {n: CASES[n] for n in ("one", "packed_state")}


def test_equals_a_loop():
    rng = np.random.default_rng(0)
    angles = np.array([0.1, 0.02, 0.3])
    (B, T, S, H, K, D, Dv), offset = (2, 3, 5, 4, 2, 3, 2), 1
    q, k, v = (rng.normal(size=(B, n, h, d)) for n, h, d in ((T, H, D), (S, K, D), (S, K, Dv)))
    allowed = rng.random(size=(B, T, S)) < 0.7
    num, den, state = linear_attention(
        q.astype(np.float32), k.astype(np.float32), v.astype(np.float32), mask=Mask(q_offset=offset),
        angle=angles.astype(np.float32), allowed=allowed, return_state=True, implementation="reference",
    )  # fmt: skip
    for b, t, h in np.ndindex(B, T, H):
        keys = [s for s in range(S) if s <= t + offset and allowed[b, t, s]]
        weights = [
            sum(q[b, t, h, d] * k[b, s, h // 2, d] * np.cos(angles[d] * (t + offset - s)) for d in range(D))
            for s in keys
        ]
        np.testing.assert_allclose(den[b, t, h], sum(weights), atol=1e-5)
        want = sum((w * v[b, s, h // 2] for w, s in zip(weights, keys, strict=True)), np.zeros(Dv))
        np.testing.assert_allclose(num[b, t, h], want, atol=1e-5)
    for b, h, d in np.ndindex(B, K, D):
        turned = sum(
            np.exp(1j * angles[d] * (S - s)) * k[b, s, h, d] * np.append(v[b, s, h], 1) for s in range(S)
        )
        np.testing.assert_allclose(state.real[b, h, d], turned.real, atol=1e-5)
        np.testing.assert_allclose(state.imag[b, h, d], turned.imag, atol=1e-5)


def test_results_are_as_wide_as_sums_need():
    x = jnp.ones((1, 2, 1, 3), jnp.bfloat16)
    num, den = linear_attention(x, x, x)
    assert num.dtype == den.dtype == jnp.float32
