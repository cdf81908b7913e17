"""Lists of documents that stand where a prepared dataset would, and the loader over them."""

import numpy as np
import pytest

from attnlab.data import DataConfig, make_loader, open_tokenizer


@pytest.fixture
def documents() -> list[bytes]:
    """23 documents with random lengths from empty to many windows, in random bytes (not valid UTF-8)."""
    rng = np.random.default_rng(7)
    lengths = [0, 1, 2, 400, 0, 997, 16, 17, 18, *rng.integers(0, 90, 14)]
    return [rng.integers(0, 256, length, np.uint8).tobytes() for length in lengths]


@pytest.fixture
def load():
    """load(documents, rows=.., **options) -> loader; T=17, B=7, no prefetch unless said. Closed after the test."""
    loaders = []

    def make(documents, *, rows=range(7), repeat=True, shuffle=True, cursor=None, min_length=None, **options):
        config = DataConfig(**{"sequence_length": 17, "batch_size": 7, "prefetch": 0, **options})
        tokenizer = open_tokenizer(config.tokenizer)
        choices = {"split": "train", "repeat": repeat, "shuffle": shuffle, "min_length": min_length}
        loader = make_loader(config, tokenizer, rows=rows, cursor=cursor, source=documents, **choices)
        loaders.append(loader)
        return loader

    yield make
    for loader in loaders:
        loader.close()


@pytest.fixture
def take():
    """take(loader, n) -> the next n batches stacked, arrays [n, R, T], and cursors [n, R, 2] under "cursor"."""

    def stack(loader, n):
        pairs = [next(loader) for _ in range(n)]
        stacked = {name: np.stack([batch[name] for batch, _ in pairs]) for name in pairs[0][0]}
        return stacked | {"cursor": np.stack([cursor for _, cursor in pairs])}

    return stack


@pytest.fixture
def assert_same():
    def compare(actual, expected):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert actual[name].dtype == expected[name].dtype, name
            np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)

    return compare
