"""What a window holds: every token once, segments, positions, weights and bytes."""

import numpy as np
import pytest

BOS, EOS, PAD = 256, 257, 258


def read_back(batches, row):
    """The documents of one row, rebuilt from its segments: a BOS input opens one, an EOS target closes one."""
    documents, current = [], None
    columns = (batches[name][:, row].reshape(-1) for name in ("tokens", "targets", "weights"))
    for token, target, weight in zip(*columns, strict=True):
        if weight:
            current = [] if token == BOS else current
            assert (token == BOS) == (not current), "an input is the target before it, or BOS"
            assert not current or token == current[-1]
            current.append(int(target))
            if target == EOS:
                documents.append(bytes(current[:-1]))
                current = None
    assert current is None
    return documents


@pytest.mark.parametrize("batch_size", [1, 3, 7, 31])
def test_one_pass_reads_every_document_once_and_in_order(documents, load, take, batch_size):
    loader = load(documents, rows=range(batch_size), batch_size=batch_size, repeat=False, shuffle=False)
    batches = take(loader, 140 if batch_size == 1 else 90)
    for row in range(batch_size):
        assert read_back(batches, row) == documents[row::batch_size]
    targets = batches["targets"][batches["weights"] > 0]
    assert batches["weights"].sum() == sum(len(d) + 1 for d in documents)
    assert batches["bytes"].sum() == sum(len(d) for d in documents)
    expected = np.bincount(np.frombuffer(b"".join(documents), np.uint8), minlength=256)
    np.testing.assert_array_equal(np.bincount(targets, minlength=264)[:256], expected)
    assert np.sum(targets == EOS) == len(documents)


def test_rows_with_nothing_left_are_padding_for_ever(documents, load, take):
    loader = load(documents, repeat=False, shuffle=False)
    take(loader, 90)
    end, again = take(loader, 2), take(loader, 2)
    for batches in (end, again):
        for name in ("weights", "segments", "positions", "bytes"):
            assert not batches[name].any(), name
        assert (batches["tokens"] == PAD).all() and (batches["targets"] == PAD).all()
    np.testing.assert_array_equal(again["cursor"], end["cursor"])
    np.testing.assert_array_equal(end["cursor"][0], [[4, 0], [4, 0], [3, 0], [3, 0], [3, 0], [3, 0], [3, 0]])


@pytest.mark.smoke
def test_windows_by_hand(load):
    """T=5: "abc" and "" fill the first window, "de" crosses into the second, which then is out of text."""
    batch, cursor = next(loader := load([b"abc", b"", b"de"], rows=[0], batch_size=1, sequence_length=5, repeat=False,
                                        shuffle=False))  # fmt: skip
    a, b, c, d, e = b"abcde"
    np.testing.assert_array_equal(batch["tokens"], [[BOS, a, b, c, BOS]])
    np.testing.assert_array_equal(batch["targets"], [[a, b, c, EOS, EOS]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 1, 2]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3, 0]])
    np.testing.assert_array_equal(batch["bytes"], [[1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(cursor, [[2, 0]])
    batch, cursor = next(loader)
    np.testing.assert_array_equal(batch["tokens"], [[BOS, d, e, PAD, PAD]])
    np.testing.assert_array_equal(batch["targets"], [[d, e, EOS, PAD, PAD]])
    np.testing.assert_array_equal(batch["weights"], [[1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 0, 0]])
    np.testing.assert_array_equal(cursor, [[3, 0]])


def test_segments_and_positions_restart_in_every_window(documents, load, take):
    batches = take(load(documents), 50)
    assert batches["weights"].all() and batches["positions"].max() < 17
    for segments, positions, tokens in zip(
        *(batches[name].reshape(-1, 17) for name in ("segments", "positions", "tokens")), strict=True
    ):
        assert segments[0] == 1 and positions[0] == 0
        new = np.diff(segments) == 1
        assert ((np.diff(segments) == 0) | new).all()
        np.testing.assert_array_equal(tokens[1:] == BOS, new)
        np.testing.assert_array_equal(positions[1:], np.where(new, 0, positions[:-1] + 1))


def test_without_isolation_a_row_is_one_segment_and_one_line_of_positions(documents, load, take, assert_same):
    isolated = take(load(documents, repeat=False), 60)
    joined = take(load(documents, repeat=False, isolate_documents=False), 60)
    real = isolated["weights"] > 0
    np.testing.assert_array_equal(joined.pop("segments"), real)
    np.testing.assert_array_equal(joined.pop("positions"), np.where(real, np.arange(17), 0))
    assert isolated.pop("segments").max() > 1 and isolated.pop("positions").max() <= 16
    assert_same(joined, isolated)


def test_truncate_gives_each_row_the_beginning_of_one_document(documents, load, take):
    batches = take(load(documents, packing="truncate", repeat=False, shuffle=False), 5)
    for i, document in enumerate(documents):
        row = {name: array[i // 7, i % 7] for name, array in batches.items()}
        n = min(17, len(document) + 1)
        np.testing.assert_array_equal(row["targets"][:n], [*document, EOS][:n])
        np.testing.assert_array_equal(row["tokens"][:n], [BOS, *document][:n])
        np.testing.assert_array_equal(row["weights"], np.arange(17) < n)
        np.testing.assert_array_equal(row["segments"], np.arange(17) < n)
    assert batches["weights"][4].sum() == 0 and batches["weights"][3, 2:].sum() == 0


def test_min_length_passes_over_short_documents(documents, load, take):
    loader = load(documents, packing="truncate", repeat=False, shuffle=False, min_length=18)
    weights = take(loader, 6)["weights"]
    assert set(weights.sum(-1).flat) == {0, 17}
    assert (weights.sum(-1) == 17).sum() == sum(len(d) + 1 >= 18 for d in documents)
    with pytest.raises(ValueError, match="No document of split 'train' has min_length=999 targets"):
        load(documents, packing="truncate", repeat=False, shuffle=False, min_length=999)
    for options in ({"repeat": True, "packing": "truncate"}, {"repeat": False}, {"repeat": True}):
        with pytest.raises(ValueError, match="min_length=3 must be positive and go with packing='truncate'"):
            load(documents, min_length=3, **options)


def test_fewer_documents_than_rows_are_read_from_different_places(load, take):
    """Five rows over one document of 100 pairs begin 20 apart, and stay so: no two rows repeat each other."""
    document = bytes(range(99))
    batches = take(load([document], rows=range(5), batch_size=5, sequence_length=10), 40)
    np.testing.assert_array_equal(batches["targets"][0, :, 0], [0, 20, 40, 60, 80])
    assert all(len(set(firsts)) == 5 for firsts in batches["targets"][:, :, 0])
    counts = np.bincount(batches["targets"].reshape(-1), minlength=100)[:99]
    np.testing.assert_array_equal(counts, 20)


def test_a_cursor_of_other_data_is_refused(documents, load):
    cursor = np.full((7, 2), 2000, np.int32)
    with pytest.raises(ValueError, match="Row 0 should go on at token 2000 of a document with"):
        next(load(documents, cursor=cursor))


def test_positions_beyond_int32_are_an_error_not_a_wrap(load):
    last = np.array([[2**31 - 1, 0]], np.int64)
    loader = load([b"abc", b"defg"], rows=[0], batch_size=1, cursor=last)
    with pytest.raises(OverflowError, match="position 2147483[0-9]+ exceeds int32"):
        next(loader)
