"""Indicators of attention maps: their values on maps known by hand, and the reading of maps off operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.controls import uniform_attention
from attnlab.attention.indicators import (
    attention_map,
    concentration_norm,
    entropy_norm,
    head_diversity,
    indicators,
    local_focus,
    logit_statistics,
)
from attnlab.attention.softmax import softmax_attention
from kernels.prefix_softmax import prefix_softmax

L, H = 11, 3
UNIFORM = np.tril(np.ones((L, L))) / np.arange(1, L + 1)[:, None]
FIRST = np.broadcast_to(np.arange(L) == 0, (L, L)).astype(np.float32)


def heads(A):
    return jnp.broadcast_to(jnp.asarray(A, jnp.float32), (H, L, L))


@pytest.mark.parametrize(
    ("A", "want"),
    [
        (UNIFORM, {"entropy_norm": 1, "conc_norm": 0, "headdiv": 0, "sink": np.mean(1 / np.arange(1, L + 1))}),
        (np.eye(L), {"entropy": 0, "entropy_norm": 0, "conc": L**0.5, "conc_norm": 1, "locfoc0": 1, "locfoc1": 0,
                     "sink": 1 / L, "headdiv": 0}),
        (FIRST, {"sink": 1, "entropy": 0, "conc_norm": 1, "locfoc0": 1 / L, "locfoc3": 1 / (L - 3)}),
        (np.eye(L, k=-2), {"locfoc2": 1, "locfoc0": 0, "locfoc1": 0, "locfoc3": 0}),
    ],
)  # fmt: skip
def test_values_known_by_hand(A, want):
    found = indicators(heads(A))
    for name, value in want.items():
        np.testing.assert_allclose(found[name], np.full(found[name].shape, value), atol=1e-6, err_msg=name)


def test_head_diversity_is_the_spread_of_heads_over_the_lower_triangle():
    A = np.stack([UNIFORM, np.eye(L), FIRST])
    above = np.triu(np.random.default_rng(0).random((H, L, L)), 1)  # what a causal map has not does not count
    for ddof in (0, 1):
        want = np.tril(A.std(0, ddof=ddof)).sum() / (L * (L + 1) / 2)
        np.testing.assert_allclose(head_diversity(A + above, ddof=ddof), want, rtol=1e-5)
    with pytest.raises(ValueError, match="ddof=3 needs more than 3 heads"):
        head_diversity(A, ddof=3)


def test_leading_axes_short_maps_and_low_precision():
    A = jnp.stack([heads(UNIFORM), heads(np.eye(L))])
    found = indicators(A)
    assert found["headdiv"].shape == (2,) and found["entropy"].shape == (2, H)
    np.testing.assert_allclose(found["entropy_norm"], [[1] * H, [0] * H], atol=1e-6)
    assert set(indicators(jnp.ones((H, 1, 1)))) == {"entropy", "conc", "headdiv", "sink", "locfoc0"}
    assert indicators(A.astype(jnp.bfloat16))["conc"].dtype == jnp.float32
    for call in (entropy_norm, concentration_norm):
        with pytest.raises(ValueError, match="needs a map of at least 2 positions, got L=1"):
            call(jnp.ones((H, 1, 1)))
    with pytest.raises(ValueError, match="distance=11 is outside a map of L=11"):
        local_focus(A, 11)
    with pytest.raises(ValueError, match="expected Float"):
        indicators(jnp.ones((H, 3, 4)))


def test_logit_statistics_count_visible_logits_only():
    logits, seen = (
        jnp.array([[3.0, -jnp.inf, 1.0], [-5.0, 2.0, 900.0]]),
        jnp.array([[1, 0, 1], [1, 1, 0]], bool),
    )
    found = logit_statistics(logits, seen)
    assert {n: float(x) for n, x in found.items() if n != "abs99"} == {
        "min": -5,
        "max": 3,
        "abs50": 2.5,
        "abs100": 5,
    }
    np.testing.assert_allclose(found["abs99"], np.quantile([1, 2, 3, 5], 0.99), rtol=1e-6)
    assert float(logit_statistics(logits)["max"]) == 900
    assert all(np.isnan(x) for x in logit_statistics(logits, jnp.zeros((2, 3), bool)).values())
    assert all(np.isnan(x) for x in logit_statistics(logits.at[0, 0].set(jnp.nan), seen).values())


def test_maps_are_read_off_operations():
    r = np.random.default_rng(0)
    q, k, s = (
        jnp.asarray(r.normal(size=shape), jnp.float32) for shape in ((2, L, 4, 6), (2, L, 2, 6), (2, L, 4))
    )
    causal = np.tril(np.ones((L, L), bool))
    dots = jnp.einsum("bthd,bjhd->bhtj", q, k.repeat(2, axis=2)) / 6**0.5
    cases = (
        (dots, lambda v: softmax_attention(q, k, v)),
        (jnp.broadcast_to(s.swapaxes(1, 2)[:, :, None], (2, 4, L, L)), lambda v: prefix_softmax(s, v)),
    )
    maps = jax.jit(lambda: [attention_map(call, 2, L, 2) for _, call in cases])()
    for (logits, _), got in zip(cases, maps, strict=True):
        want = np.exp(logits) * causal
        np.testing.assert_allclose(got, want / want.sum(-1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(attention_map(uniform_attention, 1, L, H)[0], heads(UNIFORM), atol=1e-6)
