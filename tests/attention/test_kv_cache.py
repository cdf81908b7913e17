"""The cache's two layouts slot by slot. Letters: B batch, T new tokens, S slots, W window."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import kv_cache
from kernels.masks import dense


def tokens(first: int, count: int):
    """Keys that hold their own position, [B=2, T, K=1, D=1]."""
    return jnp.broadcast_to(
        jnp.arange(first, first + count, dtype=jnp.float32)[None, :, None, None], (2, count, 1, 1)
    )


def extend(cache, first, count, window=None):
    keys = tokens(first, count)
    (key, value, log_f, mask), cache = kv_cache.extend(cache, keys, keys, keys[..., 0], window)
    seen = np.asarray(dense(mask, count, key.shape[1]))
    visible = [[np.asarray(key[b, :, 0, 0])[seen[b, t]].tolist() for t in range(count)] for b in range(2)]
    np.testing.assert_array_equal(key[..., 0], log_f)
    np.testing.assert_array_equal(key, value)
    return visible, cache


def empty(length, window=None):
    starts = jnp.array([0, 2])
    return kv_cache.init_cache(2, length, 1, 1, jnp.float32, gate_heads=1, window=window, starts=starts)


def test_full_cache_shows_every_position_from_the_first_real_one():
    visible, cache = extend(empty(6), 0, 3)
    assert visible == [[[0], [0, 1], [0, 1, 2]], [[], [], [2]]]
    visible, cache = extend(cache, 3, 2)
    assert visible == [[[0, 1, 2, 3], [0, 1, 2, 3, 4]], [[2, 3], [2, 3, 4]]]
    assert int(cache.length) == 5 and not cache.rolling


def test_rolling_cache_shows_the_window_and_keeps_no_more():
    cache = empty(100, window=3)
    assert cache.rolling and cache.key.shape[1] == 3
    visible, cache = extend(cache, 0, 4, window=3)
    assert visible == [[[0], [0, 1], [0, 1, 2], [1, 2, 3]], [[], [], [2], [2, 3]]]
    visible, cache = extend(cache, 4, 1, window=3)
    assert visible == [[[2, 3, 4]], [[2, 3, 4]]]
    np.testing.assert_array_equal(cache.key[0, :, 0, 0], [2, 3, 4])
    assert cache.log_f.shape == (2, 3, 1)


def test_positions_count_from_the_first_real_token():
    _, cache = extend(empty(9), 0, 3)
    np.testing.assert_array_equal(kv_cache.new_positions(cache, 2), [[3, 4], [1, 2]])


def test_overflow_is_an_error_or_nan_and_a_rolling_cache_has_none():
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of 4 positions"):
        extend(empty(4), 0, 5)
    _, cache = extend(empty(4), 0, 4)
    y = jnp.ones((2, 1, 3))
    np.testing.assert_array_equal(kv_cache.poison_overflow(y, cache), y)
    _, cache = extend(cache, 4, 1)
    assert np.isnan(kv_cache.poison_overflow(y, cache)).all()
    _, rolled = extend(empty(100, window=3), 0, 50, window=3)
    np.testing.assert_array_equal(kv_cache.poison_overflow(y, rolled), y)


def test_an_empty_length_is_refused():
    with pytest.raises(ValueError, match="length=0"):
        empty(0)
