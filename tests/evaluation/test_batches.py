"""Cutting and packing held-out documents, by hand."""

import itertools

import numpy as np
import pytest

from attnlab.data.packing import EncodedDocuments
from attnlab.evaluation.batches import beginning, held_out_batches, pack, pieces, whole
from tests.evaluation import small

DOCUMENTS = EncodedDocuments([b"abcd", b"e", b"", b"fghijkl"], small.TOKENIZER)
BOS, EOS = small.TOKENIZER.bos_id, small.TOKENIZER.eos_id
a, b, c, d, e, f, g, h, i, j, k, l = range(97, 109)


def test_pieces():
    tokens = [piece.tokens.tolist() for piece in whole(DOCUMENTS[3], 3)]
    assert tokens == [[BOS, f, g, h], [h, i, j, k], [k, l, EOS]]
    assert [piece.bytes.tolist() for piece in whole(DOCUMENTS[3], 3)] == [[1, 1, 1], [1, 1, 1], [1, 0]]
    assert [piece.tokens.tolist() for piece in beginning(DOCUMENTS[0], 5)] == [[BOS, a, b, c, d, EOS]]
    assert [piece.tokens.tolist() for piece in beginning(DOCUMENTS[0], 4)] == [[BOS, a, b, c, d]]
    assert not list(beginning(DOCUMENTS[0], 6))


@pytest.mark.smoke
def test_rows_hold_whole_pieces():
    rows = list(pack(pieces(DOCUMENTS, [0, 1, 2, 3], 4, whole), 4))
    assert [row["tokens"].tolist() for row in rows] == [
        [BOS, a, b, c],
        [d, BOS, e, BOS],
        [BOS, f, g, h],
        [i, j, k, l],
    ]
    assert [row["targets"].tolist() for row in rows] == [
        [a, b, c, d],
        [EOS, e, EOS, EOS],
        [f, g, h, i],
        [j, k, l, EOS],
    ]
    assert [row["segments"].tolist() for row in rows] == [[1] * 4, [1, 2, 2, 3], [1] * 4, [1] * 4]
    assert [row["positions"].tolist() for row in rows] == [
        [0, 1, 2, 3],
        [0, 0, 1, 0],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]
    assert [row["document"].tolist() for row in rows] == [[0] * 4, [0, 1, 1, 2], [3] * 4, [3] * 4]
    assert [row["bytes"].tolist() for row in rows] == [[1] * 4, [0, 1, 0, 0], [1] * 4, [1, 1, 1, 0]]
    assert all((row["weights"] == 1).all() for row in rows)


def test_a_piece_that_does_not_fit_begins_a_row():
    rows = list(pack(pieces(DOCUMENTS, [1, 0], 5, whole), 5))
    assert [row["weights"].tolist() for row in rows] == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert rows[0]["segments"].tolist() == [1, 1, 0, 0, 0]


def test_a_long_document_fills_the_rows_of_a_batch():
    """17 targets in rows of 4: two batches of 3 rows, not five batches with one row each."""
    batches = itertools.islice(held_out_batches(small.context([b"x" * 16]), 3, 4, whole), 3)
    assert [np.asarray(batch["weights"]).sum() for batch in batches] == [12, 5, 0]


def test_every_target_is_in_one_batch_and_padding_follows():
    texts = small.documents([9, 0, 33, 4, 17])
    batches = [
        {name: np.asarray(array) for name, array in batch.items()}
        for batch in itertools.islice(held_out_batches(small.context(texts), 3, 16, whole), 5)
    ]
    counted = sum(batch["weights"].sum() for batch in batches)
    assert counted == sum(len(text) + 1 for text in texts) and not batches[-1]["weights"].any()
    ids = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    expected = np.concatenate([[*text, EOS] for text in texts])
    assert sorted(ids) == sorted(expected)
    order = np.concatenate([batch["document"][batch["weights"] > 0] for batch in batches])
    lengths = np.bincount(order)
    assert sorted(lengths) == sorted(len(text) + 1 for text in texts)
    assert lengths.tolist() != [len(text) + 1 for text in texts], "the order is random"
