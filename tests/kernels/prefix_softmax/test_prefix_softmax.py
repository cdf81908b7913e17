"""Prefix softmax against other ways to the same numbers: softmax of constant queries, means, scans, continuation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting import forgetting_attention
from kernels.masks import Mask
from kernels.prefix_softmax import IMPLEMENTATIONS, PrefixState, empty_state, prefix_softmax

NAMES = [each.name for each in IMPLEMENTATIONS if "cpu" in each.platforms]
B, S, H, K, Dv = 2, 19, 6, 3, 5
RNG = np.random.default_rng(3)
LOGITS, VALUES = RNG.normal(0, 2, (B, S, H)), RNG.normal(size=(B, S, K, Dv))


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def test_equals_softmax_attention_of_constant_queries():
    """q = 1, k = s: the flash kernel as a check of outputs and gradients, grouped values repeated."""
    values = VALUES.repeat(2, axis=2)

    def by_attention(s, v):
        q = jnp.ones((B, S, H, 1))
        return forgetting_attention(q, s[..., None], v, scale=1.0, implementation="reference")

    def with_gradient(attend):
        run = jax.jit(jax.grad(lambda x: (jnp.sum(jnp.sin(o := attend(*x))), o), has_aux=True))
        return jax.tree.leaves(run((LOGITS, values)))

    want = with_gradient(by_attention)
    got = with_gradient(lambda s, v: prefix_softmax(s, v, chunk_size=4))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)


def test_equals_an_associative_scan():
    def join(a, b):
        (m1, z1, n1), (m2, z2, n2) = a, b
        m = jnp.maximum(m1, m2)
        x, y = jnp.exp(m1 - m), jnp.exp(m2 - m)
        return m, x * z1 + y * z2, x[..., None] * n1 + y[..., None] * n2

    values = VALUES.repeat(2, axis=2)
    scan = jax.jit(lambda *keys: jax.lax.associative_scan(join, keys, axis=1))
    m, z, n = scan(LOGITS, np.ones_like(LOGITS), values)
    o, lse = prefix_softmax(LOGITS, VALUES, return_lse=True, chunk_size=4)
    np.testing.assert_allclose(o, n / z[..., None], atol=1e-13)
    np.testing.assert_allclose(lse, m + np.log(z), atol=1e-13)


@pytest.mark.parametrize("implementation", NAMES)
def test_equal_logits_give_running_means_and_a_shift_changes_nothing(implementation):
    count = np.arange(1, S + 1)[:, None, None]
    means = prefix_softmax(np.zeros((B, S, K)), VALUES, implementation=implementation)
    np.testing.assert_allclose(means, VALUES.cumsum(1) / count, atol=1e-13)
    shifted, plain = (prefix_softmax(LOGITS + c, VALUES, implementation=implementation) for c in (512.0, 0.0))
    np.testing.assert_allclose(shifted, plain, atol=1e-11)


@pytest.mark.parametrize("implementation", NAMES)
def test_pieces_give_the_whole_with_outputs_state_and_gradients(implementation):
    def by_pieces(s, v, pieces):
        state, outputs, at = empty_state(B, H, Dv, jnp.float64), [], 0
        for size in pieces:
            part = slice(at, at + size)
            o, state = prefix_softmax(
                s[:, part], v[:, part], initial_state=state, return_state=True, implementation=implementation
            )
            outputs, at = [*outputs, o], at + size
        o = jnp.concatenate(outputs, axis=1)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state.n / state.z[..., None])), (o, state)

    run = jax.jit(jax.grad(by_pieces, argnums=(0, 1), has_aux=True), static_argnums=2)
    want, (o, state) = run(LOGITS, VALUES, (S,))
    got, (o_pieces, state_pieces) = run(LOGITS, VALUES, (7, 1, 1, 10))
    for x, y in zip(
        jax.tree.leaves((got, o_pieces, state_pieces)), jax.tree.leaves((want, o, state)), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-12)


def test_the_state_of_padding_and_documents():
    """Left padding leaves no trace in the state; with documents it is that of the last one."""
    starts = jnp.array([0, 4])
    state_after = jax.jit(lambda s, v, mask: prefix_softmax(s, v, mask=mask, return_state=True)[1])
    state = state_after(LOGITS, VALUES, Mask(starts=starts))
    alone = state_after(LOGITS[1:, 4:], VALUES[1:, 4:], Mask())
    np.testing.assert_allclose(
        state.n[1] / state.z[1, :, None], (alone.n / alone.z[..., None])[0], atol=1e-13
    )
    segments = jnp.array([[1] * 8 + [2] * 9 + [0] * 2] * B)
    state = state_after(LOGITS, VALUES, Mask(q_segments=segments, kv_segments=segments))
    alone = state_after(LOGITS[:, 8:17], VALUES[:, 8:17], Mask())
    for x, y in zip(state, alone, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-13)


def test_rows_of_another_segment_than_their_key_are_not_silent():
    one, other = jnp.ones((B, S), jnp.int32), jnp.ones((B, S), jnp.int32).at[:, 3].set(2)
    o = jax.jit(lambda q: prefix_softmax(LOGITS, VALUES, mask=Mask(q_segments=q, kv_segments=one)))(other)
    assert np.all(np.isnan(o[:, 3])) and np.all(np.isfinite(o[:, 4:]))
    shifted = jax.jit(lambda mask: prefix_softmax(LOGITS, VALUES, mask=mask))(Mask(q_offset=1))
    assert np.all(np.isnan(shifted))


SEGMENTS = jnp.ones((B, S), jnp.int32)
STATE = PrefixState(*(np.zeros(shape) for shape in ((B, H), (B, H), (B, H, Dv))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": Mask(window=3)}, "window=3 has no prefix form"),
        ({"mask": Mask(q_offset=2)}, "q_offset=2 does not fit"),
        ({"mask": Mask(causal=False), "return_state": True}, "a state belongs to the causal form"),
        ({"mask": Mask(causal=False), "initial_state": STATE}, "a state belongs to the causal form"),
        ({"mask": Mask(q_segments=SEGMENTS, kv_segments=SEGMENTS), "initial_state": STATE}, "unknown document"),
        ({"mask": Mask(q_segments=SEGMENTS, kv_segments=2 * SEGMENTS)}, "q_segments differ from kv_segments"),
        ({"initial_state": STATE._replace(n=np.zeros((B, H)))}, r"initial_state.n has shape \(2, 6\), expected"),
        ({"chunk_size": 0}, "chunk_size=0 must be a positive integer"),
    ],
)  # fmt: skip
def test_what_it_cannot_honour_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prefix_softmax(LOGITS, VALUES, **options)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="H=4 logit heads must be a multiple of the K=3 value heads"):
        prefix_softmax(LOGITS[..., :4], VALUES)
    with pytest.raises(ValueError, match="v is float64.*expected Float"):
        prefix_softmax(LOGITS, VALUES[:, 1:])
