"""token_log_probs against its definition in numpy, where rounding is dangerous, and what does not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels.log_prob import IMPLEMENTATIONS, BlockSizes, token_log_probs

NAMES = ("blockwise", "reference")
RNG = np.random.default_rng(5)
H, W, LABELS = RNG.normal(size=(9, 6)), RNG.normal(size=(6, 17)), RNG.integers(0, 17, 9)
SMALL = BlockSizes(4, 5)


def run(implementation, h=H, w=W, labels=LABELS, dtype=np.float32, **options):
    return token_log_probs(
        jnp.asarray(h, dtype), jnp.asarray(w, dtype), labels, implementation=implementation,
        block_sizes=SMALL, return_argmax=True, **options,
    )  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", NAMES)
def test_equals_numpy(implementation):
    x = 3 * np.tanh(H @ W / 3) / 0.5
    lse = np.log(np.exp(x).sum(1))
    p = np.exp(x - lse[:, None])
    out = run(implementation, temperature=0.5, soft_cap=3.0)
    np.testing.assert_allclose(out.logp, x[np.arange(9), LABELS] - lse, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(out.lse, lse, rtol=1e-5)
    np.testing.assert_allclose(out.entropy, -(p * np.log(p)).sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out.argmax, x.argmax(1))


def test_the_gradient_is_that_of_finite_differences():
    """The contract compares with the reference's gradient, so that one is checked here."""

    def value(h, w, implementation):
        out = run(implementation, h, w, dtype=np.float64, temperature=0.8, soft_cap=4.0)
        return jnp.sum(out.logp * jnp.arange(9)) + jnp.sum(jnp.cos(out.entropy)) + jnp.sum(out.lse**2)

    with jax.enable_x64(True):
        for implementation in NAMES:
            check_grads(
                jax.jit(lambda h, w, i=implementation: value(h, w, i)),
                (H, W),
                order=1,
                modes=["rev"],
                rtol=1e-6,
            )


@pytest.mark.parametrize("implementation", NAMES)
def test_the_entropy_of_a_peaked_row_keeps_its_digits(implementation):
    """Logits near 1000, one ahead by 12: of lse - sum p x the rounding of 1000 would leave two digits of H = 0.0013."""
    x = np.full((1, 17), 1000.0)
    x[0, 11] += 12
    out = run(implementation, np.ones((1, 1)), x, np.array([11]))
    p = 1 / (np.exp(12.0) + 16)
    np.testing.assert_allclose(out.entropy, 16 * p * 12 + np.log1p(16 * np.exp(-12.0)), rtol=1e-3)


@pytest.mark.parametrize("implementation", NAMES)
def test_the_entropy_of_a_certain_row_is_zero_and_never_below(implementation):
    out = run(implementation, 100 * H)
    assert np.all(out.entropy >= 0) and np.any(out.entropy < 1e-6)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_logits_of_any_size(implementation, size):
    def likelihood_and_entropy(h):
        out = run(implementation, h)
        return out.logp.sum() + out.entropy.sum()

    value, gradient = jax.value_and_grad(likelihood_and_entropy)(jnp.asarray(H * size, jnp.float32))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def total(implementation, h, w, labels, **options):
    out = run(implementation, h, w, labels, **options)
    return out.logp.sum() + out.entropy.sum() + (out.lse**2).sum(), out


@pytest.mark.parametrize("implementation", NAMES)
def test_rows_that_do_not_count_are_exact_zeros_whatever_they_hold(implementation):
    mask = np.arange(9) % 3 != 1
    labels = np.where(np.arange(9) == 8, -100, LABELS)
    counted = mask & (labels >= 0)
    gradient = jax.grad(total, argnums=(1, 2), has_aux=True)
    garbage, w = np.where(counted[:, None], H, np.nan).astype(np.float32), W.astype(np.float32)
    (dh, dw), out = gradient(implementation, garbage, w, labels, mask=mask)
    for x in (*out[:3], dh):
        assert np.all(np.asarray(x)[~counted] == 0) and np.all(np.asarray(x)[counted] != 0)
    assert np.all(np.asarray(out.argmax)[~counted] == -1)
    (_, alone), _ = gradient(implementation, H[counted].astype(np.float32), w, LABELS[counted])
    np.testing.assert_allclose(dw, alone, atol=1e-5)


@pytest.mark.parametrize("implementation", NAMES)
def test_a_label_beyond_the_vocabulary_is_not_silent(implementation):
    out = run(implementation, labels=np.where(np.arange(9) == 2, 17, LABELS))
    assert np.isnan(out.logp[2]) and np.isfinite(np.delete(np.asarray(out.logp), 2)).all()


@pytest.mark.parametrize("implementation", NAMES)
def test_the_lowest_of_equal_tokens_is_the_likeliest(implementation):
    w = W.copy()
    w[:, [4, 6, 14]] = 5  # in one block and in two
    assert run(implementation, np.ones((1, 6)), w, np.array([0])).argmax[0] == 4


def test_what_is_not_asked_for_is_none():
    out = token_log_probs(H, W, LABELS, return_entropy=False)
    assert out.entropy is None and out.argmax is None and out.logp.shape == (9,)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((H, W.T, LABELS), {}, r"weight \(17, 6\) with vocab_axis=1 has no axis of the hidden size 6"),
        ((H, W, LABELS[:3]), {}, r"labels is int.*\[3\], expected Int\[N\].* with N=9"),
        ((H, W, LABELS), {"vocab_axis": 2}, "vocab_axis=2 must be 1"),
        ((H, W, LABELS), {"temperature": 0.0}, "temperature=0.0 must be positive"),
        ((H, W, LABELS), {"soft_cap": -1.0}, "soft_cap=-1.0 is negative"),
        ((H[:0], W, LABELS[:0]), {}, r"empty operands hidden \(0, 1, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        token_log_probs(*arguments, **options)


def test_block_sizes_are_checked():
    with pytest.raises(ValueError, match="block sizes rows=0, vocab=5 must be positive integers"):
        BlockSizes(0, 5)


def test_kernels_come_before_the_dense_reference():
    assert [each.name for each in IMPLEMENTATIONS] == ["pallas_tpu", "pallas_gpu", "blockwise", "reference"]
