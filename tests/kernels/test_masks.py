"""Masks: the dense matrix against a loop, block ranges against the dense matrix, gates nobody reads, and the checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import masks
from kernels.masks import Mask

T, S, B = 13, 29, 2
SEGMENTS = np.array([[1] * 7 + [2] * 12 + [3] * 10, [0] * 3 + [5] * 13 + [9] * 9 + [0] * 4], np.int32)


def all_masks():
    """One of every kind, with row 0 at several positions, before the first key and past the last one too."""
    for offset in (0, 5, 16, 29):
        rows = np.stack([np.take(row, np.clip(offset + np.arange(T), 0, S - 1)) for row in SEGMENTS])
        yield Mask(q_offset=offset)
        yield Mask(q_offset=offset, window=6, lengths=jnp.array([29, 11]))
        yield Mask(q_offset=offset, starts=jnp.array([4, 23]))
        yield Mask(q_offset=offset, q_segments=jnp.asarray(rows), kv_segments=jnp.asarray(SEGMENTS))
    yield Mask(q_offset=-4)
    yield Mask(causal=False, lengths=jnp.array([3, 0]))


def by_loops(mask):
    seen = np.zeros((B, T, S), bool)
    for b, i, j in np.ndindex(B, T, S):
        a = mask.q_offset + i
        seen[b, i, j] = (
            (j <= a or not mask.causal)
            and (mask.window is None or a - j < mask.window)
            and (mask.starts is None or j >= mask.starts[b])
            and (mask.lengths is None or j < mask.lengths[b])
            and (mask.q_segments is None or mask.q_segments[b, i] == mask.kv_segments[b, j] != 0)
        )
    return seen


@pytest.mark.smoke
def test_dense_is_the_definition():
    for mask in all_masks():
        np.testing.assert_array_equal(
            np.broadcast_to(masks.dense(mask, T, S), (B, T, S)), by_loops(mask), str(mask)
        )


def test_the_example_of_the_docstring():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(masks.dense(Mask(window=2), 4, 4)[0], np.array(expected, bool))


@pytest.mark.parametrize(("block_q", "block_k"), [(1, 1), (4, 3), (64, 5)])
def test_block_ranges_never_skip_a_visible_pair_and_skip_what_they_can(block_q, block_k):
    nq, nk = -(-T // block_q), -(-S // block_k)
    for mask in all_masks():
        needed = np.broadcast_to(masks.visible_blocks(mask, T, S, block_q, block_k), (B, nq, nk))
        padded = np.pad(by_loops(mask), ((0, 0), (0, nq * block_q - T), (0, nk * block_k - S)))
        truly = padded.reshape(B, nq, block_q, nk, block_k).any((2, 4))
        assert not np.any(truly & ~needed), mask
        if (
            mask.q_segments is None
            and (mask.starts is None or block_q == 1)
            and (mask.window is None or block_q == 1)
        ):
            np.testing.assert_array_equal(needed, truly, str(mask))
        (first, last), n = masks.key_block_range(needed), np.arange(nk)
        assert np.all(((n >= first[..., None]) & (n < last[..., None])) | ~truly)
        (first, last), m = masks.query_block_range(needed), np.arange(nq)
        assert np.all(((m >= first[..., None]) & (m < last[..., None])) | ~truly.swapaxes(1, 2))


@pytest.mark.parametrize(("block_q", "block_k"), [(1, 1), (3, 5), (8, 4)])
def test_clear_blocks_are_those_without_an_invisible_pair(block_q, block_k):
    """Of rows that exist; keys past S are invisible. The first run of them is what kernels go through unmasked."""
    for mask in all_masks():
        clear, seen = masks.clear_blocks(mask, T, S, block_q, block_k), by_loops(mask)
        nq, nk = clear.shape[1:]
        padding = ((0, 0), (0, nq * block_q - T), (0, 0))
        padded = np.pad(np.pad(seen, padding, constant_values=True), ((0, 0), (0, 0), (0, nk * block_k - S)))
        truly = padded.reshape(-1, nq, block_q, nk, block_k).all((2, 4))
        np.testing.assert_array_equal(np.broadcast_to(clear, truly.shape), truly, str(mask))
        (first, end), n = masks.clear_range(clear), np.arange(nk)
        run = (n >= first[..., None]) & (n < end[..., None])
        assert not np.any(run & ~clear) and np.array_equal(run.any(-1), clear.any(-1))


def test_segments_in_different_blocks_are_skipped():
    segments = jnp.asarray(np.repeat([[1, 2, 3]], 8, axis=1).reshape(1, 24))
    mask = Mask(q_segments=segments, kv_segments=segments)
    np.testing.assert_array_equal(masks.visible_blocks(mask, 24, 24, 8, 8)[0], np.eye(3, dtype=bool))


def test_a_traced_offset_gives_the_same_ranges():
    def ranges(offset):
        return masks.key_block_range(masks.visible_blocks(Mask(q_offset=offset, window=6), T, S, 4, 3))

    for offset in (0, 5, 16):
        np.testing.assert_array_equal(jax.jit(ranges)(offset), ranges(offset))
    np.testing.assert_array_equal(ranges(16), [[[3, 5, 6, 7]], [[7, 8, 10, 10]]])


def test_a_gate_is_unread_exactly_when_no_visible_pair_crosses_it():
    for mask in all_masks():
        if not mask.causal or mask.q_offset + T > S + 16 or mask.window is not None:
            continue
        seen, a = by_loops(mask), mask.q_offset + np.arange(T)
        crossed = np.stack([(seen[:, a >= l][:, :, :l]).any((1, 2)) for l in range(S)], axis=1)
        unread = np.broadcast_to(masks.unread_gates(mask, T, S), (B, S))
        assert not np.any(unread & crossed), mask
        if mask.lengths is None:
            np.testing.assert_array_equal(unread, ~crossed, str(mask))


def test_errors_name_the_values():
    with pytest.raises(ValueError, match="window=4 needs causal=True"):
        Mask(causal=False, window=4)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        Mask(window=0)
    with pytest.raises(ValueError, match="kv_segments is missing"):
        Mask(q_segments=jnp.ones((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"mask.starts has shape \(3,\), expected \(2,\)"):
        masks.validate(Mask(starts=jnp.zeros(3, jnp.int32)), 2, 5, 7)
    with pytest.raises(ValueError, match=r"mask.kv_segments has shape \(2, 5\), expected \(2, 7\)"):
        masks.validate(Mask(q_segments=jnp.ones((2, 5), int), kv_segments=jnp.ones((2, 5), int)), 2, 5, 7)
    with pytest.raises(ValueError, match="mask.lengths has dtype float32"):
        masks.validate(Mask(lengths=jnp.ones(2)), 2, 5, 7)


def test_a_mask_is_a_pytree_with_static_choices():
    mask = Mask(window=3, starts=jnp.array([1, 2]))
    leaves, tree = jax.tree.flatten(mask)
    assert len(leaves) == 2 and tree.unflatten(leaves).window == 3
    assert jax.jit(lambda m: masks.dense(m, 4, 4))(mask).shape == (2, 4, 4)
