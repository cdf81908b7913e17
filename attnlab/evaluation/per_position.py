"""Loss by position in the document: how much context helps, and what happens beyond the training length.

    L(i) = mean over documents of the loss at target i,        i = 0, 1, ..
    P(l) = exp(mean of L(i) over i < l)                        perplexity with contexts of up to l tokens

(the evaluation protocol of the Forgetting Transformer, arXiv 2503.02130, section 4.2). L still falling at i means that
context of that length helps; rising beyond the training length means that the model does not extrapolate. Only
documents of at least the evaluated length are read, from their first token, so every L(i) is over the same documents,
and the document is the sampling unit. Accumulated on the host in float64.

Letters: B rows of the batch, T evaluated length, N documents.
"""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from attnlab.evaluation import estimates
from attnlab.evaluation.batches import beginning, held_out_batches
from attnlab.evaluation.config import EvalConfig
from attnlab.evaluation.evaluator import Context, Result
from attnlab.evaluation.scores import score


def run(context: Context, config: EvalConfig) -> Result:
    """Scalars: perplexity/l at powers of two l, trained_loss and beyond_loss (see `summarize`), documents.

    Rows: one a position, with loss L(i), its error, the documents behind it, the moving average of L, and P(i + 1).
    ValueError if no document of the split is long enough.
    """
    trained = context.experiment.data.sequence_length
    length = config.per_position_length or 4 * trained
    curve = LossCurve(length, marks(length, trained))
    for losses in document_losses(context, length, config.per_position_documents):
        curve.add(losses)
    if not curve.count:
        raise ValueError(
            f"no document of split {context.split_name!r} has {length} targets; lower eval.per_position_length"
        )
    rows = curve.table(config.per_position_smoothing)
    return Result(summarize(curve, trained), rows, lambda: _figure(rows, trained))


def document_losses(context: Context, length: int, documents: int):
    """Yield losses [N', length] in nats of the first targets of N' documents, `documents` of them in all (0: all)."""
    data = context.experiment.data
    rows = max(
        1, data.batch_size * data.sequence_length // length
    )  # as many tokens in a batch as in training
    left = documents or math.inf
    for scores in score(context, held_out_batches(context, rows, length, beginning)):
        losses = scores["nll"][scores["weights"].any(axis=1)]
        yield losses[: int(min(left, len(losses)))]
        left -= len(losses)
        if left <= 0:
            return


def marks(length: int, trained: int) -> list[int]:
    """Lengths l at which whole documents are compared: powers of two, half the training length, it, and the last."""
    powers = [2**n for n in range(length.bit_length()) if 2**n <= length]
    return sorted({*powers, length} | {l for l in (trained // 2, trained) if 0 < l <= length})


class LossCurve:
    """Sums over documents at every position, and each document's own sums up to the marks."""

    def __init__(self, length: int, marks: list[int]):
        self.marks = marks
        self.count = 0  # N
        self._sum, self._squares = np.zeros(length), np.zeros(length)  # [T]
        self._up_to: list[np.ndarray] = []  # of [N', marks]

    def add(self, losses: np.ndarray) -> None:
        """Take in losses [N', T] of N' documents."""
        losses = losses.astype(np.float64)
        self.count += len(losses)
        self._sum += losses.sum(axis=0)
        self._squares += np.square(losses).sum(axis=0)
        self._up_to.append(np.cumsum(losses, axis=1)[:, np.array(self.marks) - 1])

    def loss(self) -> tuple[np.ndarray, np.ndarray]:
        """L [T] and its standard error [T], NaN with a single document."""
        mean = self._sum / self.count
        variance = np.maximum(self._squares / self.count - np.square(mean), 0)
        return mean, np.sqrt(variance / (self.count - 1)) if self.count > 1 else np.full_like(mean, np.nan)

    def between(self, start: int, stop: int) -> np.ndarray:
        """Each document's mean loss over targets start <= i < stop, [N]; both are marks, or 0 for start."""
        up_to = np.concatenate(self._up_to)
        before = up_to[:, self.marks.index(start)] if start else 0.0
        return (up_to[:, self.marks.index(stop)] - before) / (stop - start)

    def table(self, smoothing: int) -> list[dict[str, Any]]:
        """The rows of `run`; position counts from 0."""
        loss, error = self.loss()
        perplexity = np.exp(np.cumsum(loss) / np.arange(1, len(loss) + 1))
        columns = {
            "position": range(len(loss)),
            "loss": loss.tolist(),
            "loss_se": error.tolist(),
            "documents": [self.count] * len(loss),
            "smoothed": estimates.moving_average(loss, smoothing).tolist(),
            "perplexity": perplexity.tolist(),
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def summarize(curve: LossCurve, trained: int) -> dict[str, float]:
    """perplexity/l with errors; trained_loss, the mean of L over the second half of the training length.

    Where longer documents were read also beyond_loss, the mean of L past the training length, and extrapolation =
    beyond_loss - trained_loss: above 0 by more than its error, the model does worse than where it was trained.
    """
    scalars = {}
    for l in (l for l in curve.marks if l.bit_count() == 1):
        mean, error = estimates.mean(curve.between(0, l))
        scalars |= {f"perplexity/{l}": math.exp(mean), f"perplexity/{l}_se": math.exp(mean) * error}
    length = curve.marks[-1]
    if trained <= length:
        near = curve.between(trained // 2, trained)
        scalars |= _with_error("trained_loss", near)
        if trained < length:
            beyond = curve.between(trained, length)
            scalars |= _with_error("beyond_loss", beyond) | _with_error("extrapolation", beyond - near)
    return scalars | {"documents": float(curve.count)}


def _with_error(name: str, values: np.ndarray) -> dict[str, float]:
    return dict(zip((name, f"{name}_se"), estimates.mean(values), strict=True))


def _figure(rows: list[dict[str, Any]], trained: int) -> Figure:
    position, smoothed, error = (
        np.array([r[key] for r in rows]) for key in ("position", "smoothed", "loss_se")
    )
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(
        position, smoothed - error, smoothed + error, alpha=0.2, label="standard error of one position"
    )
    axes.plot(position, smoothed, label="loss, moving average")
    if trained < len(rows):
        axes.axvline(trained, color="black", linestyle="--", label="training length")
    axes.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)")
    axes.set_title(f"{rows[0]['documents']} documents", loc="left", fontsize="medium")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
