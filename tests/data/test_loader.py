"""The stream of batches: the same for every seed, host count and restart, whatever makes it faster."""

import itertools

import numpy as np
import pytest

from attnlab.data import DataConfig


@pytest.mark.smoke
def test_equal_seeds_give_equal_batches_and_others_do_not(documents, load, take, assert_same):
    one = take(load(documents, seed=3), 30)
    assert_same(take(load(documents, seed=3), 30), one)
    for other in ({"seed": 4}, {"seed": 3, "shuffle": False}):
        assert not np.array_equal(take(load(documents, **other), 30)["tokens"], one["tokens"])


@pytest.mark.parametrize("packing", ["concatenate", "truncate"])
@pytest.mark.parametrize("repeat", [True, False])
def test_a_cursor_resumes_exactly_at_any_point(documents, load, take, assert_same, packing, repeat):
    unbroken = take(load(documents, packing=packing, repeat=repeat), 40)
    for n in (1, 2, 5, 11, 23):
        resumed = load(documents, packing=packing, repeat=repeat, cursor=unbroken["cursor"][n - 1])
        assert_same(take(resumed, 40 - n), {name: array[n:] for name, array in unbroken.items()})


@pytest.mark.parametrize("prefetch", [0, 3])
def test_grain_state_resumes_exactly_in_place_and_elsewhere(documents, load, take, assert_same, prefetch):
    loader = load(documents, prefetch=prefetch)
    take(loader, 6)
    state, expected = loader.get_state(), take(loader, 9)
    loader.set_state(state)  # back in time, with batches already prefetched
    assert_same(take(loader, 9), expected)
    elsewhere = load(documents, prefetch=prefetch)
    elsewhere.set_state(state)
    assert_same(take(elsewhere, 9), expected)


def test_prefetch_changes_nothing_and_the_cursor_belongs_to_its_batch(documents, load, take, assert_same):
    plain = take(load(documents), 25)
    assert_same(take(load(documents, prefetch=4), 25), plain)


@pytest.mark.parametrize("hosts", [2, 4, 7])
def test_any_division_of_rows_gives_the_same_global_batches(documents, load, take, assert_same, hosts):
    whole = take(load(documents), 30)
    shares = [list(range(7))[host::hosts] for host in range(hosts)]
    parts = [take(load(documents, rows=rows), 12) for rows in shares]
    for rows, part in zip(shares, parts, strict=True):
        assert_same(part, {name: array[:12, rows] for name, array in whole.items()})
    # restart on one host, and on three that divide the rows in another way
    cursor = np.empty((7, 2), np.int32)
    for rows, part in zip(shares, parts, strict=True):
        cursor[rows] = part["cursor"][-1]
    for rows in (range(7), [6, 0], [1, 5], [2, 3, 4]):
        resumed = take(load(documents, rows=rows, cursor=cursor[list(rows)]), 18)
        assert_same(resumed, {name: array[12:, list(rows)] for name, array in whole.items()})


def test_every_epoch_is_complete_and_in_another_order(load):
    documents = [bytes([i]) * 16 for i in range(21)]  # 17 pairs: one window each
    loader = load(documents)
    epochs = [np.concatenate([next(loader)[0]["targets"][:, 0] for _ in range(3)]) for _ in range(4)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(21))
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(epochs, 2))
    plain = load(documents, shuffle=False)
    for _ in range(2):
        first = np.concatenate([next(plain)[0]["targets"][:, 0] for _ in range(3)])
        np.testing.assert_array_equal(first, np.arange(21))


def test_worker_processes_build_the_same_batches_and_resume(documents, load, take, assert_same):
    plain = take(load(documents), 12)
    loader = load(documents, workers=2, prefetch=1, cursor=plain["cursor"][1])
    assert_same(take(loader, 2), {name: array[2:4] for name, array in plain.items()})
    state = loader.get_state()
    assert_same(take(loader, 3), {name: array[4:7] for name, array in plain.items()})
    loader.set_state(state)
    assert_same(take(loader, 8), {name: array[4:12] for name, array in plain.items()})


def test_options_that_cannot_be_met_are_sentences(documents, load):
    for rows in ([], [0, 0], [7], [-1]):
        with pytest.raises(ValueError, match=r"must be one or more different rows of 0\.\.6"):
            load(documents, rows=rows)
    with pytest.raises(ValueError, match="workers=3 exceeds the 2 rows built here"):
        load(documents, rows=[1, 2], workers=3)
    for cursor in (np.zeros((6, 2), np.int32), np.zeros((7, 2)), np.full((7, 2), -1)):
        with pytest.raises(ValueError, match="must hold two non-negative integers for each of the 7 rows"):
            load(documents, cursor=cursor)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("sequence_length", 0, "sequence_length=0 must be at least 1"),
        ("batch_size", -2, "batch_size=-2 must be at least 1"),
        ("prefetch", -1, "prefetch=-1 must be at least 0"),
        ("workers", -1, "workers=-1 must be at least 0"),
        ("seed", 2**32, "seed=4294967296 must lie in 0..4294967295"),
        ("packing", "pad", "packing='pad' must be one of concatenate, truncate"),
        ("source", "wiki", "source='wiki' must begin with one of local, tfds"),
        ("tokenizer", "bpe:x", "tokenizer='bpe:x' must begin with one of bytes, sentencepiece, hf"),
        ("eval_split", "", "eval_split is empty"),
    ],
)
def test_bad_options_are_named_with_their_value(option, value, sentence):
    DataConfig().validate()
    with pytest.raises(ValueError, match=sentence):
        DataConfig(**{option: value}).validate()
