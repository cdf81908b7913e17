"""make_loader: a source, a tokeniser and a packing become an endless, resumable iterator over batches.

Letters: B rows of the global batch, R rows built by this process, T tokens per row.
"""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np
from absl import flags

from attnlab.data.config import DataConfig
from attnlab.data.packing import Batch, EncodedDocuments, PackedRows, Packing
from attnlab.data.sources import DocumentSource, open_source
from attnlab.data.tokenizers import Tokenizer


def make_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    rows: Sequence[int],
    split: str,
    repeat: bool,
    shuffle: bool,
    cursor: np.ndarray | None = None,
    sequence_length: int | None = None,
    packing: str | None = None,
    min_length: int | None = None,
    source: DocumentSource | None = None,
) -> grain.DatasetIterator:
    """Iterate for ever over (batch, cursor).

    batch: dict of numpy arrays [R, T], row i being global row rows[i]: tokens, targets, segments, positions
        int32; weights float32 (1 where the target counts, 0 in padding and where config.learn_after says
        so); bytes float32 (text bytes the target
        accounts for).
    cursor: int32 [R, 2], the position of each row after that batch. Give it back to go on exactly there, with
        any other division of the same B rows among processes. It belongs to one source, tokeniser, B, seed
        and mode.

    rows: global rows (0..B-1) to build; process_rows names those that a sharding needs here.
    repeat: True reads the documents again and again, each epoch in another order if shuffle. False is one
        pass, in which every token is a target exactly once; rows with nothing left give padding (weights 0)
        for ever.
    packing: "concatenate" or "truncate" (one document per row, its first T targets); default config.packing.
    min_length: with packing="truncate" and repeat=False, pass over documents with fewer targets (EOS is one).
    source: documents already opened, for instance behind a barrier; default config.source, opened here.

    Call close() on the iterator to stop its threads and processes early. Raises ValueError for options that
    contradict each other, and what open_source raises.
    """
    changes = {"sequence_length": sequence_length, "packing": packing}
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None}).validate()
    rows = _check_rows(rows, config)
    _check_min_length(min_length, config, repeat)
    source = open_source(config.source, split, config.data_dir) if source is None else source
    encoded = EncodedDocuments(source, tokenizer, config.learn_after)
    if min_length is not None and not any(len(encoded[i]) >= min_length for i in range(len(encoded))):
        raise ValueError(
            f"No document of split {split!r} has min_length={min_length} targets: ask for fewer."
        )
    options = Packing(
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        pad_id=tokenizer.pad_id,
        mode=config.packing,
        isolate_documents=config.isolate_documents,
        min_length=min_length or 1,
        # With fewer documents than rows, rows that begin together would read the same text side by side.
        stagger=repeat and config.packing == "concatenate" and len(encoded) < config.batch_size,
    )
    documents = _order(encoded, config.seed, repeat, shuffle)
    dataset = PackedRows(documents, options, rows, _check_cursor(cursor, len(rows)))
    return iter(_prefetched(dataset, config))


def _order(encoded: EncodedDocuments, seed: int, repeat: bool, shuffle: bool) -> grain.MapDataset:
    documents = grain.MapDataset.source(encoded)
    if shuffle:
        documents = documents.seed(seed).shuffle()
    return documents.repeat() if repeat else documents


def _prefetched(dataset: PackedRows, config: DataConfig) -> grain.IterDataset:
    if config.workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl flags, which only absl's app.run parses
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=max(1, config.prefetch))
        dataset = JoinedRows(dataset.mp_prefetch(options), config.workers)
    if config.prefetch:
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=config.prefetch)
    return dataset


class JoinedRows(grain.IterDataset):
    """Put together the batches of `workers` processes, of which process w builds rows w, w + workers, .."""

    def __init__(self, parts: grain.IterDataset, workers: int):
        super().__init__(parts)
        self.workers = workers

    def __iter__(self) -> grain.DatasetIterator:
        return _JoinedRowsIterator(iter(self._parent), self.workers)


class _JoinedRowsIterator(grain.DatasetIterator):
    def __init__(self, parts: grain.DatasetIterator, workers: int):
        super().__init__(parts)
        self._workers = workers

    def __next__(self) -> tuple[Batch, np.ndarray]:
        batches, cursors = zip(*(next(self._parent) for _ in range(self._workers)), strict=True)
        return {name: _interleave([b[name] for b in batches]) for name in batches[0]}, _interleave(cursors)

    def get_state(self) -> dict:
        return self._parent.get_state()

    def set_state(self, state: dict) -> None:
        self._parent.set_state(state)


def _interleave(parts: Sequence[np.ndarray]) -> np.ndarray:
    joined = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for worker, part in enumerate(parts):
        joined[worker :: len(parts)] = part
    return joined


def _check_rows(rows: Sequence[int], config: DataConfig) -> tuple[int, ...]:
    rows = tuple(int(row) for row in rows)
    if not rows or len(set(rows)) != len(rows) or min(rows) < 0 or max(rows) >= config.batch_size:
        raise ValueError(f"rows={rows} must be one or more different rows of 0..{config.batch_size - 1}.")
    if config.workers > len(rows):
        raise ValueError(
            f"workers={config.workers} exceeds the {len(rows)} rows built here: a worker needs a row."
        )
    return rows


def _check_min_length(min_length: int | None, config: DataConfig, repeat: bool) -> None:
    if min_length is not None and (min_length < 1 or repeat or config.packing != "truncate"):
        raise ValueError(
            f"min_length={min_length} must be positive and go with packing='truncate' and repeat=False, "
            f"not with packing={config.packing!r} and repeat={repeat}."
        )


def _check_cursor(cursor: np.ndarray | None, num_rows: int) -> np.ndarray:
    if cursor is None:
        return np.zeros((num_rows, 2), np.int32)
    cursor = np.array(cursor)
    if cursor.shape != (num_rows, 2) or cursor.dtype.kind not in "iu" or cursor.min(initial=0) < 0:
        raise ValueError(
            f"cursor {cursor.dtype}{list(cursor.shape)} must hold two non-negative integers for each of the "
            f"{num_rows} rows."
        )
    return cursor
