"""What holds for tropical attention by its mathematics, and what it refuses.

Letters: B batch, T queries, S keys, H heads, D and Dv head sizes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.masks import Mask
from kernels.tropical import BlockSizes, combine_contexts, shift_winners, tropical_attention, tropical_scores
from kernels.tropical.attention import arguments, blockwise

ALL = Mask(causal=False)


def draw(T=13, S=17, H=2, D=7, Dv=5, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(2, n, H, d)).astype(dtype) for n, d in ((T, D), (S, D), (S, Dv))]


@partial(jax.jit, static_argnames=("score", "implementation", "block_sizes", "score_scale"))
def attend(q, k, v, mask=ALL, **options):
    """(o, context, winners)."""
    return tropical_attention(q, k, v, mask=mask, return_context=True, return_winners=True, **options)


@pytest.mark.parametrize("score", ["hilbert", "maxplus_dot"])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_any_size_give_the_same_bits_as_the_dense_form(score, causal, monkeypatch):
    monkeypatch.setitem(blockwise.__globals__, "TILE", 64)  # several groups of heads
    q, k, v = draw(T=37, S=37, H=3, D=11)
    mask = Mask(starts=jnp.array([0, 5])) if causal else Mask(causal=False, lengths=jnp.array([37, 30]))
    want = attend(q, k, v, mask, score=score, implementation="reference")
    for sizes in (BlockSizes(37, 37), BlockSizes(8, 16), BlockSizes(5, 3)):
        got = attend(q, k, v, mask, score=score, implementation="blockwise", block_sizes=sizes)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_winner_certifies_the_maximum():
    q, k, v = draw()
    _, c, j = attend(q, k, v)
    sums = np.asarray(tropical_scores(q, k))[..., None] + v.swapaxes(1, 2)[:, :, None]  # [B, H, T, S, Dv]
    c, j = c.swapaxes(1, 2), j.swapaxes(1, 2)
    assert np.all(c[:, :, :, None] >= sums)
    np.testing.assert_array_equal(np.take_along_axis(sums, np.asarray(j)[:, :, :, None], 3)[:, :, :, 0], c)


def test_shifting_a_token_changes_nothing_and_shifting_all_values_adds():
    q, k, v = (x.round() for x in draw())  # integers: sums are exact
    rng = np.random.default_rng(1)
    of_q, of_k = rng.integers(-4, 5, size=(2, 13, 2, 1)), rng.integers(-4, 5, size=(2, 17, 2, 1))
    for score in ("hilbert", "hilbert_asym"):
        _, c, j = attend(q, k, v, score=score)
        for x, y in zip(attend(q + of_q, k + of_k, v, score=score)[1:], (c, j), strict=True):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(attend(q, k, v + 3, score=score)[1], c + 3)


def test_duplicate_empty_and_permuted_keys_leave_the_context_alone():
    q, k, v = draw()
    c = attend(q, k, v)[1]
    order = np.random.default_rng(2).permutation(17)
    np.testing.assert_array_equal(attend(q, k[:, order], v[:, order])[1], c)
    for more in (v[:, :1], np.full_like(v[:, :1], -np.inf)):
        got = attend(q, np.concatenate([k, k[:, :1]], 1), np.concatenate([v, more], 1))
        np.testing.assert_array_equal(got[1], c)
        np.testing.assert_array_equal(got[2], attend(q, k, v)[2])  # the copy comes later and wins nothing


def test_the_context_moves_by_at_most_five_times_the_change_of_its_operands():
    operands, changes = draw(dtype=np.float64), draw(seed=3, dtype=np.float64)
    with jax.enable_x64(True):
        moved = [x + 0.01 * np.sign(d) for x, d in zip(operands, changes, strict=True)]
        moved = np.abs(attend(*moved)[1] - attend(*operands)[1]).max()
    assert 0.02 < moved <= 0.05 + 1e-12


def test_results_over_parts_of_the_keys_combine_exactly():
    q, k, v = (x.round() for x in draw(S=20))  # many ties
    want = attend(q, k, v)[1:]
    for parts in (2, 4):
        size = 20 // parts
        found = []
        for n in range(0, 20, size):
            _, c, j = attend(q, k[:, n : n + size], v[:, n : n + size])
            found.append((c, shift_winners(j, n)))
        for some in (found, found[::-1]):  # in any order
            total = some[0]
            for each in some[1:]:
                total = combine_contexts(total, each)
            for x, y in zip(total, want, strict=True):
                np.testing.assert_array_equal(x, y)
    nothing = (jnp.full_like(want[0], -jnp.inf), jnp.full_like(want[1], -1))
    np.testing.assert_array_equal(combine_contexts(nothing, want)[1], want[1])
    np.testing.assert_array_equal(combine_contexts(nothing, nothing)[1], -1)


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_ties_go_to_the_lowest_key_and_channel(implementation):
    """All tokens equal: key 0 wins everywhere; all channels of q - k equal: the score has no gradient at all."""
    q = k = v = jnp.zeros((1, 3, 1, 4))
    names = {"score": "maxplus_dot", "implementation": implementation}
    gradients = jax.grad(lambda *x: tropical_attention(*x, **names).sum(), argnums=(0, 1, 2))(q, k, v)
    dq, dk, dv = (np.asarray(x[0, :, 0]) for x in gradients)
    np.testing.assert_array_equal(dq, np.tile([4, 0, 0, 0], (3, 1)))
    np.testing.assert_array_equal(dk, [[12, 0, 0, 0], [0] * 4, [0] * 4])
    np.testing.assert_array_equal(dv, [[3] * 4, [0] * 4, [0] * 4])
    names["score"] = "hilbert"
    gradients = jax.grad(lambda *x: tropical_attention(*x, **names).sum(), argnums=(0, 1))(q, k, v)
    assert all(np.all(np.asarray(x) == 0) for x in gradients)


def test_gradients_are_slopes():
    """Finite differences in float64, where no winner changes."""
    operands = draw(T=5, S=6, D=5, Dv=3, dtype=np.float64)
    slopes, bias = np.array([0.3, 0.1]), np.random.default_rng(5).normal(size=(2, 1, 5, 6))
    with jax.enable_x64(True):
        for score in ("hilbert", "hilbert_asym", "maxplus_dot"):

            def value(q, k, v, slopes, bias, score=score):
                return jnp.sin(
                    tropical_attention(q, k, v, mask=Mask(q_offset=1), slopes=slopes, bias=bias, score=score)
                ).sum()

            point = [jnp.asarray(x) for x in (*operands, slopes, bias)]
            step = [
                1e-7 * jnp.asarray(np.random.default_rng(n).normal(size=x.shape)) for n, x in enumerate(point)
            ]
            value = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3, 4)))
            gradients = value(*point)[1]
            ahead, behind = (
                value(*[x + sign * d for x, d in zip(point, step, strict=True)])[0] for sign in (1, -1)
            )
            want = sum(jnp.sum(g * 2 * d) for g, d in zip(gradients, step, strict=True))
            np.testing.assert_allclose(ahead - behind, want, rtol=1e-5)


def test_smoothing_overestimates_by_at_most_log_n_over_beta_and_vanishes():
    q, k, v = draw(T=5, S=9, D=5, dtype=np.float64)
    with jax.enable_x64(True):
        hard = attend(q, k, v, score="maxplus_dot")[1]
        for beta in (1.0, 8.0, 1000.0):
            call = jax.jit(partial(tropical_attention, score="maxplus_dot", return_context=True))
            excess = call(q, k, v, smooth_beta=beta)[1] - hard
            assert np.all(excess >= -1e-12) and np.all(excess <= np.log(5 * 9) / beta + 1e-12)
        one = call(q, k, v, smooth_beta=1.0)[1]
        lse = tropical_attention(q, k, v, score="lse_dot", return_context=True)[1]
        np.testing.assert_allclose(lse, one, rtol=1e-12)
        traced = jax.jit(
            lambda beta: tropical_attention(q, k, v, smooth_beta=beta)
        )  # annealed without recompiling
        np.testing.assert_allclose(traced(1e5), attend(q, k, v)[0], atol=1e-3)


def test_hidden_batches_give_zeros_and_finite_gradients():
    q, k, v = draw()
    for options in (
        {"mask": Mask(causal=False, lengths=jnp.array([0, 0]))},
        {"bias": jnp.full((1, 1, 1, 1), -jnp.inf)},
    ):
        for extra in ({}, {"smooth_beta": 2.0}):
            call = lambda *x: tropical_attention(*x, **options, **extra).sum()  # noqa: B023, E731
            value, gradients = jax.jit(jax.value_and_grad(call, argnums=(0, 1, 2)))(q, k, v)
            assert value == 0 and all(np.all(np.asarray(g) == 0) for g in gradients)


def test_edges_as_bias_are_one_step_of_dynamic_programming():
    """With equal queries and keys the context is max_j (E_ij + v_j): a Bellman update, repeated for longest paths."""
    rng = np.random.default_rng(6)
    edges = np.where(np.tril(rng.random((7, 7)) < 0.6, -1), rng.integers(1, 9, (7, 7)), -np.inf)
    edges[np.diag_indices(7)] = 0
    zeros, value = jnp.zeros((1, 7, 1, 2)), np.zeros((1, 7, 1, 1), np.float32)
    for _ in range(7):
        value = tropical_attention(
            zeros, zeros, value, bias=edges[None, None].astype(np.float32), devaluation="none"
        )
    longest = np.zeros(7)
    for i in range(7):
        longest[i] = (
            max(edges[i, j] + longest[j] for j in range(i)) if i and np.isfinite(edges[i, :i]).any() else 0
        )
        longest[i] = max(longest[i], 0)
    np.testing.assert_array_equal(np.asarray(value)[0, :, 0, 0], longest)


def test_context_is_clipped_and_devalued_as_asked():
    q, k, v = draw()
    c = np.asarray(attend(q, k, v)[1])
    for name, function in (("expm1", np.expm1), ("exp", np.exp), ("none", lambda c: c)):
        o = tropical_attention(q, k, v, devaluation=name, context_clip=0.5)
        np.testing.assert_allclose(o, function(np.minimum(c, 0.5)), rtol=1e-6)


def test_nan_is_not_lost():
    q, k, v = draw()
    v[0, 3, 1, 2] = np.nan
    o = np.asarray(tropical_attention(q, k, v))
    assert np.all(np.isnan(o[0, :, 1, 2])) and np.isnan(o).sum() == 13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "cosine"}, "score='cosine' is unknown"),
        ({"devaluation": "log"}, "devaluation='log' is unknown"),
        ({"smooth_beta": 0.0}, "smooth_beta=0.0 must be positive"),
        ({"smooth_beta": 2.0, "score": "lse_dot"}, "smooth with beta 1"),
        ({"smooth_beta": 2.0, "return_winners": True}, "a smooth maximum has no winners"),
        ({"score": "lse_dot", "return_winners": True}, "a smooth maximum has no winners"),
        ({"slopes": np.ones(2, np.float32)}, "give a causal mask"),
        ({"bias": np.ones((3, 1, 1, 1), np.float32)}, "does not broadcast to"),
        ({"block_sizes": (8, 0)}, "must be positive integers"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        if "block_sizes" in options:
            options = {"block_sizes": BlockSizes(*options["block_sizes"])}
        tropical_attention(*draw(), **options)


def test_heads_that_do_not_divide_are_refused():
    q, k, v = draw(H=3)
    with pytest.raises(ValueError, match="H=3 query heads must be a multiple of the K=2"):
        tropical_attention(q, k[:, :, :2], v[:, :, :2])


def test_default_blocks_cover_the_length_evenly():
    for length in (1, 7, 8, 111, 129, 1000, 4096):
        size = arguments.BlockSizes.choose(length, length).q
        assert size <= 128 and (size % 8 == 0 or length < 8)
        assert -(-length // size) == -(-length // 128)
