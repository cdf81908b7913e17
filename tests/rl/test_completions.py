"""Completions: the first stop token, pads that are stops, the overlong penalty, groups worth keeping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.rl.completions import drop_truncated, finish, keep_groups, overlong_penalty

IDS = np.array([[[4, 2, 7, 2, 9], [5, 5, 5, 5, 5]], [[2, 4, 4, 4, 4], [3, 6, 6, 6, 2]]])  # 2 and 3 stop


@pytest.mark.smoke
@pytest.mark.parametrize("pad", [0, 2], ids=["pad", "pad is stop"])
def test_completions_end_with_their_first_stop_token(pad):
    done = finish(jnp.asarray(IDS), (2, 3), pad)
    np.testing.assert_array_equal(done.lengths, [[2, 5], [1, 1]])
    np.testing.assert_array_equal(done.truncated, [[False, True], [False, False]])
    np.testing.assert_array_equal(done.mask, np.arange(5) < np.asarray(done.lengths)[..., None])
    np.testing.assert_array_equal(done.ids, np.where(done.mask, IDS, pad))
    again = finish(done.ids, (2, 3), pad)
    for a, b in zip(again, done, strict=True):
        np.testing.assert_array_equal(a, b)
    changed = np.where(done.mask, IDS, 8)  # what was drawn after the end
    np.testing.assert_array_equal(finish(jnp.asarray(changed), (2, 3), pad).ids, done.ids)
    kept = drop_truncated(done.mask, done.truncated)
    np.testing.assert_array_equal(kept.sum(-1), [[2, 0], [1, 1]])


def test_without_stop_tokens_everything_is_truncated():
    done = finish(jnp.asarray(IDS), (), 0)
    assert done.mask.all() and done.truncated.all()


def test_overlong_penalty():
    got = overlong_penalty(jnp.array([0, 6, 7, 8, 10, 11]), 10, 4)
    np.testing.assert_allclose(got, [0, 0, -0.25, -0.5, -1, -1])
    with pytest.raises(ValueError, match="cache=11"):
        overlong_penalty(jnp.array([1]), 10, 11)


def test_groups_are_kept_if_their_rewards_differ():
    third = np.float32(1e4) / 3
    rewards = [[1, 1, 1], [0, 1, 0], [third] * 3, [0, np.nan, 0], [0, np.nan, 0.1], [np.nan] * 3, [0, 0, 5]]
    rows = np.ones((7, 3), bool)
    rows[-1, -1] = False
    keep = jax.jit(keep_groups)(jnp.asarray(rewards, jnp.float32), rows)
    np.testing.assert_array_equal(keep, [False, True, False, False, True, False, False])
    assert jax.jit(keep_groups)(jnp.asarray(rewards, jnp.float32))[-1]
