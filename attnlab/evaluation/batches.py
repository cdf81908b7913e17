"""Held-out documents as global batches on a mesh: one pass, in a fixed random order.

A document is cut at its own multiples of T targets, and every piece is scored on its own, several short ones sharing a
row. So what a target is predicted from depends on its document and T alone, never on the batch size or the mesh (the
training loader cuts documents wherever a row is full). Rows are filled one after another, so long documents spread over
a batch; every process tokenises all that is read, and keeps the rows of its devices.

Letters: B rows of the global batch that hold text, T tokens per row, n targets of a piece.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from attnlab.data.hosts import process_rows, to_global
from attnlab.data.packing import Document, EncodedDocuments
from attnlab.data.sources import open_source
from attnlab.evaluation.evaluator import Context
from attnlab.training.sharding import BATCH

ORDER_SEED = 0  # not the run's own, so that runs with different seeds are compared on the same documents
FIELDS = {"tokens": np.int32, "targets": np.int32, "weights": np.float32, "segments": np.int32}
FIELDS |= {"positions": np.int32, "bytes": np.float32, "document": np.int32}

Batch = dict[str, np.ndarray]
Cut = Callable[
    [Document, int], Iterator["Piece"]
]  # (document, length) -> pieces of at most that many targets


class Piece(NamedTuple):
    """tokens int32 [n + 1], bytes and weights float32 [n] of targets which are predicted from each other alone."""

    tokens: np.ndarray
    bytes: np.ndarray
    weights: np.ndarray


def whole(document: Document, length: int) -> Iterator[Piece]:
    """All targets of a document, `length` at a time from its beginning."""
    for start in range(0, len(document), length):
        stop = min(start + length, len(document))
        yield _piece(document, start, stop)


def beginning(document: Document, length: int) -> Iterator[Piece]:
    """The first `length` targets of a document that has so many; nothing of a shorter one."""
    if len(document) >= length:
        yield _piece(document, 0, length)


def _piece(document: Document, start: int, stop: int) -> Piece:
    here = slice(start, stop)
    return Piece(document.tokens[start : stop + 1], document.num_bytes[here], document.weights[here])


def held_out_batches(
    context: Context, batch_size: int, length: int, cut: Cut
) -> Iterator[dict[str, jax.Array]]:
    """Yield batches [>= B, T] of the pieces which `cut` makes, without end; after the last they are all padding.

    The arrays are those of the training loader and `document` int32, the number of the document in the order of
    reading. Rows are added, all padding, until the mesh's batch axes divide them. ValueError if mesh.sequence does not
    divide T.
    """
    if length % context.mesh.shape["sequence"]:
        raise ValueError(
            f"evaluation length {length} is not a multiple of mesh.sequence={context.mesh.shape['sequence']}; "
            "change one of them"
        )
    sharding, global_rows = NamedSharding(context.mesh, BATCH), padded_rows(batch_size, context.mesh)
    rows = process_rows(sharding, (global_rows, length))
    documents = open_documents(context)
    order = np.random.default_rng(ORDER_SEED).permutation(len(documents))
    packed = pack(pieces(documents, order, length, cut), length)
    while True:
        filled = list(itertools.islice(packed, batch_size))
        needed = [filled[row] if row < len(filled) else blank(length) for row in rows]
        local = {name: np.stack([row[name] for row in needed]) for name in FIELDS}
        yield to_global(local, rows, sharding, global_rows)


def open_documents(context: Context) -> EncodedDocuments:
    """The documents of the context's split as tokens."""
    data = context.experiment.data
    source = (
        open_source(data.source, context.split_name, data.data_dir)
        if context.source is None
        else context.source
    )
    return EncodedDocuments(source, context.tokenizer, data.learn_after)


def padded_rows(batch_size: int, mesh: Mesh) -> int:
    """The least multiple of the mesh's batch axes that is at least batch_size."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH[0])
    return parts * -(-batch_size // parts)


def pieces(
    documents: EncodedDocuments, order: Sequence[int], length: int, cut: Cut
) -> Iterator[tuple[int, Piece]]:
    """(number of the document, piece) of all documents in order."""
    for number, index in enumerate(order):
        for piece in cut(documents[int(index)], length):
            yield number, piece


def pack(pieces: Iterable[tuple[int, Piece]], length: int) -> Iterator[Batch]:
    """Fill rows [T] with pieces in order, each whole, as a document of its own."""
    row, filled, segment = blank(length), 0, 0
    for number, piece in pieces:
        n = len(piece.bytes)
        if filled + n > length:
            yield row
            row, filled, segment = blank(length), 0, 0
        here, segment = slice(filled, filled + n), segment + 1
        row["tokens"][here], row["targets"][here] = piece.tokens[:-1], piece.tokens[1:]
        row["weights"][here], row["segments"][here] = piece.weights, segment
        row["positions"][here], row["bytes"][here] = np.arange(n), piece.bytes
        row["document"][here] = number
        filled += n
    if filled:
        yield row


def blank(length: int) -> Batch:
    """A row [T] that is all padding."""
    return {name: np.zeros(length, dtype) for name, dtype in FIELDS.items()}
