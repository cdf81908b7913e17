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


def test_decays_equal_the_recurrence():
    """Z_t = diag(e^g) Z_{t-1} diag(e^h) + k v^T token by token; a number a token is the same for all channels."""
    rng = np.random.default_rng(0)
    T, K, D, Dv = 6, 2, 3, 4
    q, k, g, v, h = (rng.normal(size=(1, T, K, n)) for n in (D, D, D, Dv, Dv))
    number = -rng.uniform(0, 2, size=(1, T, K))

    def walk(g, h, v):
        Z, rows = np.zeros((K, D, v.shape[-1])), []
        for t in range(T):
            Z = (
                np.exp(g[0, t])[..., None] * Z * np.exp(h[0, t])[:, None]
                + k[0, t][..., None] * v[0, t][:, None]
            )
            rows.append(np.einsum("kde,kd->ke", Z, q[0, t]))
        return np.stack(rows)[None], Z[None]

    def run(**options):
        narrow = {n: x.astype(np.float32) for n, x in options.items() if n != "denominator"}
        return linear_attention(
            *(x.astype(np.float32) for x in (q, k, v)), return_state=True, implementation="reference",
            **options | narrow,
        )  # fmt: skip

    num, den, state = run(log_key_decay=-(g**2), log_value_decay=-(h**2), denominator=False)
    want, last = walk(-(g**2), -(h**2), v)
    assert den is None
    np.testing.assert_allclose(num, want, atol=1e-5)
    np.testing.assert_allclose(state.real, last, atol=1e-5)
    num, den, state = run(log_key_decay=number)
    ones = np.concatenate([v, np.ones((1, T, K, 1))], axis=-1)
    want, last = walk(np.repeat(number[..., None], D, -1), np.zeros_like(ones), ones)
    np.testing.assert_allclose(np.concatenate([num, den[..., None]], -1), want, atol=1e-5)
    np.testing.assert_allclose(state.real, last, atol=1e-5)


def test_results_are_as_wide_as_sums_need():
    x = jnp.ones((1, 2, 1, 3), jnp.bfloat16)
    num, den = linear_attention(x, x, x)
    assert num.dtype == den.dtype == jnp.float32
