"""What holds for the max-plus scans: state carry, chunks, ties, equality with attention, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.masks import Mask
from kernels.tropical import maxplus_linear_attention, maxplus_scan, tropical_attention
from kernels.tropical.linear import blockwise as linear_blockwise


def integers(*shape, seed=0, low=-3, high=4):
    return np.random.default_rng(seed).integers(low, high, size=shape).astype(np.float32)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "associative"])
def test_the_scan_carries_its_state_and_the_carry_wins_ties(implementation):
    a, b = integers(2, 37, 3, low=-1, high=1), integers(2, 37, 3, seed=1)
    run = jax.jit(
        lambda a, b, h0: maxplus_scan(
            a, b, h0, return_state=True, return_carry_wins=True, implementation=implementation
        )
    )
    h0 = np.full((2, 3), -np.inf, np.float32)
    h, state, won = run(a, b, h0)
    want, carry = np.zeros_like(b), h0
    for t in range(37):
        np.testing.assert_array_equal(won[:, t], a[:, t] + carry >= b[:, t])
        want[:, t] = carry = np.maximum(a[:, t] + carry, b[:, t])
    np.testing.assert_array_equal(h, want)
    first, middle, _ = run(a[:, :11], b[:, :11], h0)
    rest, last, _ = run(a[:, 11:], b[:, 11:], middle)
    np.testing.assert_array_equal(np.concatenate([first, rest], 1), h)
    np.testing.assert_array_equal(last, state)
    gradient = jax.grad(lambda b: maxplus_scan(0 * b, b, implementation=implementation).sum())
    np.testing.assert_array_equal(gradient(jnp.zeros((1, 4, 1)))[0, :, 0], [4, 0, 0, 0])


def test_a_hard_reset_by_minus_infinity_forgets_exactly():
    a, b = -np.ones((1, 9, 2), np.float32), integers(1, 9, 2)
    a[:, 4] = -np.inf
    for name in ("reference", "blockwise", "associative"):
        whole = maxplus_scan(a, b, implementation=name)
        np.testing.assert_array_equal(whole[:, 4:], maxplus_scan(a[:, 4:], b[:, 4:]))


def draw(T=29, K=2, G=3, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(2, T, H, D)).astype(np.float32) for H, D in ((K * G, 7), (K, 7), (K, 5)))
    return q, k, v, -rng.uniform(0, 0.2, size=(2, T, K)).astype(np.float32)


def test_linear_attention_is_attention_with_the_max_plus_dot_score():
    q, k, v, a = draw()
    cumulative = np.cumsum(a.astype(np.float64), 1).swapaxes(1, 2)
    bias = np.repeat(cumulative[..., None] - cumulative[:, :, None], 3, axis=1).astype(np.float32)
    for decay, extra in ((None, {}), (a, {"bias": bias})):
        _, c, j = tropical_attention(
            q, k, v, score="maxplus_dot", mask=Mask(), return_context=True, return_winners=True, **extra
        )
        for name in ("reference", "blockwise"):
            got, winners = maxplus_linear_attention(q, k, v, decay, return_winners=True, implementation=name)
            np.testing.assert_allclose(got, c, atol=2e-6)
            np.testing.assert_array_equal(winners, j)


@pytest.mark.parametrize("size", [5, 29])
def test_chunks_of_any_size_and_states_carried_over_are_the_same(size, monkeypatch):
    q, k, v, a = (np.round(4 * x) for x in draw())  # integers: exact, and full of ties
    want = maxplus_linear_attention(
        q, k, v, a, return_state=True, return_winners=True, implementation="reference"
    )
    monkeypatch.setitem(linear_blockwise.__globals__, "CHUNK", size)
    got = maxplus_linear_attention(q, k, v, a, return_state=True, return_winners=True)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)
    first, state = maxplus_linear_attention(*(x[:, :10] for x in (q, k, v, a)), return_state=True)
    rest, last, winners = maxplus_linear_attention(
        *(x[:, 10:] for x in (q, k, v, a)), initial_state=state, return_state=True, return_winners=True
    )
    np.testing.assert_array_equal(np.concatenate([first, rest], 1), want[0])
    np.testing.assert_array_equal(last, want[1])
    np.testing.assert_array_equal(winners, np.maximum(np.asarray(want[2])[:, 10:] - 10, -1))


def test_gradients_reach_the_initial_state_and_leave_through_the_last():
    q, k, v, a = draw(T=70)
    state = np.random.default_rng(7).normal(size=(2, 2, 7, 5)).astype(np.float32)

    def loss(operands, name):
        *rest, state = operands
        c, last = maxplus_linear_attention(*rest, initial_state=state, return_state=True, implementation=name)
        return jnp.sin(c).sum() + jnp.sum(last * jnp.cos(jnp.arange(last.size)).reshape(last.shape))

    got, want = (
        jax.jit(jax.grad(lambda x, n=n: loss(x, n)))((q, k, v, a, state)) for n in ("blockwise", "reference")
    )
    for x, y in zip(got, want, strict=True):
        assert np.any(y != 0)
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Mask(causal=False), "causal=False"),
        (Mask(window=3), "window=3"),
        (Mask(q_offset=2), "q_offset=2"),
        (Mask(lengths=4), "leave both out"),
    ],
)
def test_masks_that_a_scan_cannot_honour_are_refused(mask, message):
    q, k, v, a = draw(T=5)
    with pytest.raises(ValueError, match=f"maxplus_linear_attention .*{message}"):
        maxplus_linear_attention(q, k, v, a, mask=mask)
    with pytest.raises(ValueError, match=f"maxplus_scan .*{message}"):
        maxplus_scan(a, a, mask=mask)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, a = draw(T=5)
    with pytest.raises(ValueError, match="H=6 query heads must be a multiple of the K=4"):
        maxplus_linear_attention(q, np.repeat(k, 2, 2), np.repeat(v, 2, 2))
    with pytest.raises(ValueError, match="log_decay is float32"):
        maxplus_linear_attention(q, k, v, a[:, :, :1])
    with pytest.raises(ValueError, match="h0 is float32"):
        maxplus_scan(a, a, np.zeros((2, 3), np.float32))
