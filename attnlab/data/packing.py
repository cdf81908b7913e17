"""Packing: documents of any length become batches of fixed shape, one independent stream per batch row.

Letters: B rows of the global batch, R rows built by this process, T tokens per row, n text tokens of a
document.

A document is [BOS] t1 .. tn [EOS]. It gives n + 1 pairs (input, target): (BOS, t1), (t1, t2), .. (tn, EOS).
So every token but BOS is a target exactly once, EOS is never an input, no target lies across two documents,
and nothing is wasted. Row r reads documents r, r + B, r + 2B, .. and its whole state is (finished, offset):
how many documents it has done, and how many pairs of the current one. Rows know nothing of each other, so any
set of processes may share them out, and a restored run may share them out differently.
"""

import dataclasses
import weakref
from collections.abc import Sequence

import grain
import numpy as np

from attnlab.data.sources import DocumentSource
from attnlab.data.tokenizers import ByteTokenizer, Tokenizer, as_text

Batch = dict[str, np.ndarray]
_MAX_INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """tokens int32 [n + 2] with BOS and EOS; float32 [n + 1] for each target: its text bytes, and its weight."""

    tokens: np.ndarray
    num_bytes: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.num_bytes)

    def tail(self, start: int) -> "Document":
        return Document(self.tokens[start:], self.num_bytes[start:], self.weights[start:])


class EncodedDocuments:
    """A source's documents as tokens. Rows that are reading the same document share one copy of it.

    learn_after: targets up to and with the first such text of a document weigh 0, as do none of a document that lacks
        it, and none at all if it is "". A token that reaches beyond that text counts, and so does EOS.
    """

    def __init__(self, source: DocumentSource, tokenizer: Tokenizer, learn_after: str = ""):
        self.source, self.tokenizer, self.learn_after = source, tokenizer, learn_after
        self._open = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Document:
        document = self._open.get(index)
        if document is None:
            text = self.source[index]
            ids, num_bytes = self.tokenizer.encode_with_bytes(text)
            tokens = np.concatenate([[self.tokenizer.bos_id], ids, [self.tokenizer.eos_id]], dtype=np.int32)
            weights = self._weights(text, num_bytes)
            document = self._open[index] = Document(tokens, num_bytes, weights)
        return document

    def _weights(self, text: str | bytes, num_bytes: np.ndarray) -> np.ndarray:
        weights = np.ones(len(num_bytes), np.float32)
        if not self.learn_after:
            return weights
        wanted = self.learn_after.encode("utf-8")
        found = _counted_bytes(text, self.tokenizer).find(wanted)
        if found >= 0:
            stop, border = np.cumsum(num_bytes, dtype=np.float64), found + len(wanted)
            # A target without bytes that stands at the border begins a character beyond it: it counts.
            weights[(stop <= border) & (stop - num_bytes < border)] = 0
            weights[-1] = 1
        return weights

    def __getstate__(self) -> dict:
        return {"source": self.source, "tokenizer": self.tokenizer, "learn_after": self.learn_after}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How documents fill rows; see DataConfig and make_loader for the meaning of each choice."""

    batch_size: int  # B
    sequence_length: int  # T
    pad_id: int
    mode: str = "concatenate"
    isolate_documents: bool = True
    min_length: int = 1  # truncate only: documents with fewer targets are passed over
    stagger: bool = False  # rows start at different places of their first document


class RowStream:
    """Global row `row` of the batch, reading on from (finished, offset)."""

    def __init__(self, documents: grain.MapDataset, packing: Packing, row: int, finished: int, offset: int):
        self.documents, self.packing, self.row = documents, packing, row
        self.finished, self.offset = finished, offset
        self._document: Document | None = None

    def fill(self, out: Batch) -> None:
        """Write the next window into `out`, views [T] of an empty batch; write nothing when all is read."""
        self._truncate(out) if self.packing.mode == "truncate" else self._concatenate(out)

    def _concatenate(self, out: Batch) -> None:
        filled, segment = 0, 1
        while filled < self.packing.sequence_length and (document := self._current()) is not None:
            count = min(self.packing.sequence_length - filled, len(document) - self.offset)
            self._write(out, document, filled, count, segment)
            filled, segment, self.offset = filled + count, segment + 1, self.offset + count
            if self.offset == len(document):
                self._advance()

    def _truncate(self, out: Batch) -> None:
        while (document := self._current()) is not None:
            if long_enough := len(document) >= self.packing.min_length:
                self._write(out, document, 0, min(self.packing.sequence_length, len(document)), 1)
            self._advance()
            if long_enough:
                return

    def _write(self, out: Batch, document: Document, filled: int, count: int, segment: int) -> None:
        here, there = slice(filled, filled + count), slice(self.offset, self.offset + count)
        isolated = self.packing.isolate_documents
        out["tokens"][here] = document.tokens[there]
        out["targets"][here] = document.tokens[self.offset + 1 : self.offset + 1 + count]
        out["weights"][here] = document.weights[there]
        out["segments"][here] = segment if isolated else 1
        # A document that goes on from the window before starts at 0 again: it sees nothing of that window.
        out["positions"][here] = np.arange(count) if isolated else np.arange(filled, filled + count)
        out["bytes"][here] = document.num_bytes[there]

    def _current(self) -> Document | None:
        if self._document is None:
            index = self.row + self.finished * self.packing.batch_size  # a Python integer: no overflow
            if index >= len(self.documents):
                return None
            document = self.documents[index]
            if self.packing.stagger and self.finished == 0:
                document = document.tail(len(document) * self.row // self.packing.batch_size)
            if self.offset >= len(document):
                raise ValueError(
                    f"Row {self.row} should go on at token {self.offset} of a document with {len(document)}: "
                    "the data, the tokeniser or the seed is not the one this position was saved with."
                )
            self._document = document
        return self._document

    def _advance(self) -> None:
        self.finished, self.offset, self._document = self.finished + 1, 0, None


class PackedRows(grain.IterDataset):
    """Yield (batch, cursor) for ever: arrays [R, T] of the given rows, int32 [R, 2] where each is after them.

    A row that has read all its documents gives padding.
    """

    def __init__(
        self, documents: grain.MapDataset, packing: Packing, rows: Sequence[int], cursor: np.ndarray
    ):
        super().__init__(documents)
        self.documents, self.packing, self.rows, self.cursor = documents, packing, tuple(rows), cursor

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keep the rows of one worker process; grain alone slices the documents, which changes batches."""
        del sequential_slice
        self.rows, self.cursor = self.rows[sl], self.cursor[sl]

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedRowsIterator(self)


class _PackedRowsIterator(grain.DatasetIterator):
    def __init__(self, dataset: PackedRows):
        super().__init__()
        self._dataset = dataset
        self._start(dataset.cursor)

    def _start(self, cursor: np.ndarray) -> None:
        data = self._dataset
        self._streams = [
            RowStream(data.documents, data.packing, row, int(finished), int(offset))
            for row, (finished, offset) in zip(data.rows, cursor, strict=True)
        ]

    def _cursor(self) -> np.ndarray:
        cursor = np.array([(stream.finished, stream.offset) for stream in self._streams], np.int64)
        if cursor.max() > _MAX_INT32:
            raise OverflowError(
                f"A row's position {cursor.max()} exceeds int32: restart from a cursor of zeros."
            )
        return cursor.astype(np.int32)

    def __next__(self) -> tuple[Batch, np.ndarray]:
        batch = empty_batch(len(self._streams), self._dataset.packing)
        for i, stream in enumerate(self._streams):
            stream.fill({name: array[i] for name, array in batch.items()})
        return batch, self._cursor()

    def get_state(self) -> dict:
        return {"cursor": self._cursor().reshape(-1).tolist()}  # JSON, as grain's own checkpoints want it

    def set_state(self, state: dict) -> None:
        self._start(np.asarray(state["cursor"], np.int32).reshape(-1, 2))


def _counted_bytes(text: str | bytes, tokenizer: Tokenizer) -> bytes:
    """The bytes that encode_with_bytes counts: those of the text as the tokeniser reads it."""
    if isinstance(text, bytes) and not isinstance(tokenizer, ByteTokenizer):
        text = as_text(text)
    return text.encode("utf-8") if isinstance(text, str) else text


def empty_batch(num_rows: int, packing: Packing) -> Batch:
    """A batch [num_rows, T] that is all padding."""
    shape = (num_rows, packing.sequence_length)
    return {
        "tokens": np.full(shape, packing.pad_id, np.int32),
        "targets": np.full(shape, packing.pad_id, np.int32),
        "weights": np.zeros(shape, np.float32),
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "bytes": np.zeros(shape, np.float32),
    }
