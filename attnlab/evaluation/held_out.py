"""How well held-out text is predicted: loss, perplexity, bits per byte, accuracy, each with its standard error.

    loss = sum of nll / targets,   perplexity = exp(loss),   bits per byte = sum of nll / (ln 2 * bytes)

over all targets of one pass, or of its first `eval.batches` batches; documents come in a fixed random order, so these
are a fair sample. The sampling unit of the errors is the document, or what was read of it. Bits per byte may be
compared between tokenisers; loss and perplexity may not.

Letters: B rows of the batch, T tokens per row.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from attnlab.evaluation import estimates
from attnlab.evaluation.batches import held_out_batches, whole
from attnlab.evaluation.config import EvalConfig
from attnlab.evaluation.evaluator import Context, Result
from attnlab.evaluation.scores import score

SUMS = ("nll", "hits", "weights", "bytes")
Scores = dict[str, np.ndarray]


def run(context: Context, config: EvalConfig) -> Result:
    """Scalars loss, perplexity, bits_per_byte and accuracy with errors (`_se`); targets, bytes, documents, batches.

    Rows: one a document. ValueError if the split has no target.
    """
    sums, batches = document_sums(_scores(context, config))
    scalars = summarize(sums) | {"batches": float(batches)}
    rows = table(sums)
    return Result(scalars, rows, lambda: _figure(rows, scalars))


def _scores(context: Context, config: EvalConfig) -> Iterator[Scores]:
    data = context.experiment.data
    length = config.sequence_length or data.sequence_length
    batches = held_out_batches(context, config.batch_size or data.batch_size, length, whole)
    return score(context, itertools.islice(batches, config.batches or None))


def document_sums(batches: Iterable[Scores]) -> tuple[Scores, int]:
    """Sums over each document, float64 [documents], of the scores [B, T] of all batches; and the number of batches."""
    sums, count = {name: np.zeros(0) for name in SUMS}, 0
    for scores in batches:
        count += 1
        document = scores["document"].reshape(-1)
        for name, old in sums.items():
            new = np.bincount(document, scores[name].reshape(-1).astype(np.float64), minlength=len(old))
            new[: len(old)] += old
            sums[name] = new
    seen = sums["weights"] > 0
    return {name: values[seen] for name, values in sums.items()}, count


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """The scalars of `run` from sums over documents."""
    loss, loss_se = estimates.ratio(sums["nll"], sums["weights"])
    bits, bits_se = estimates.ratio(sums["nll"] / math.log(2), sums["bytes"])
    accuracy, accuracy_se = estimates.ratio(sums["hits"], sums["weights"])
    perplexity = float(np.exp(loss))
    return {
        "loss": loss,
        "loss_se": loss_se,
        "perplexity": perplexity,
        "perplexity_se": perplexity * loss_se,
        "bits_per_byte": bits,
        "bits_per_byte_se": bits_se,
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "targets": float(sums["weights"].sum()),
        "bytes": float(sums["bytes"].sum()),
        "documents": float(len(sums["weights"])),
    }


def table(sums: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row a document: targets, bytes, loss in nats a token, bits per byte (NaN without bytes)."""
    rows = zip(*(sums[name].tolist() for name in ("weights", "bytes", "nll")), strict=True)
    return [
        {
            "targets": targets,
            "bytes": size,
            "loss": nll / targets,
            "bits_per_byte": nll / math.log(2) / size if size else math.nan,
        }
        for targets, size, nll in rows
    ]


def _figure(rows: list[dict[str, Any]], scalars: dict[str, float]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values = [row["bits_per_byte"] for row in rows if np.isfinite(row["bits_per_byte"])]
    axes.hist(values, bins=40, weights=[row["bytes"] for row in rows if np.isfinite(row["bits_per_byte"])])
    axes.axvline(scalars["bits_per_byte"], color="black", label=f"all text: {scalars['bits_per_byte']:.3f}")
    axes.set(xlabel="bits per byte of a document", ylabel="bytes of text")
    axes.legend()
    return figure
