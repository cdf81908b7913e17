"""Random batches of a combinatorial task, of one size or of many.

Letters: N instances, n size of an instance, T tokens of the longest one, F features.
"""

from typing import NamedTuple

import numpy as np

from attnlab.data.combinatorial.task import Task

CHUNK = 1024  # instances drawn at once: bounds the memory of solvers' tables


class Sample(NamedTuple):
    """x float32 [N, T, F]; y [N] or [N, T]; value [N] or [N, T] or None; mask bool [N, T], False at padding (zeros)."""

    x: np.ndarray
    y: np.ndarray
    value: np.ndarray | None
    mask: np.ndarray


def sample(task: Task, rng: np.random.Generator, batch: int, length: int | tuple[int, int]) -> Sample:
    """`batch` instances of size `length`, or of sizes uniform in a range (low, high), padded to the largest one drawn.

    A task with noise_prob > 0 disturbs the features, after the label unless its noise_before_label says otherwise.
    Equal generators give equal samples. ValueError for sizes the task does not have.
    """
    return _sample(task, rng, batch, length)[1]


def sample_pair(
    task: Task, rng: np.random.Generator, batch: int, length: int | tuple[int, int]
) -> tuple[Sample, Sample]:
    """The same instances without and with noise. Where the label follows the noise, it does so in the second alone."""
    return _sample(task, rng, batch, length)


def _sample(task, rng, batch, length):
    low, high = (length, length) if isinstance(length, int) else length
    if not task.smallest <= low <= high:
        raise ValueError(
            f"length={length} does not suit {type(task).__name__}; give sizes of at least {task.smallest}"
        )
    if batch < 1:
        raise ValueError(f"batch={batch} instances cannot be drawn; ask for at least 1")
    sizes = rng.integers(low, high, batch, endpoint=True)
    tokens = task.tokens(int(sizes.max()))
    rows, parts = [], []
    for size in np.unique(sizes):
        of_size = np.flatnonzero(sizes == size)
        for start in range(0, len(of_size), CHUNK):
            chunk = of_size[start : start + CHUNK]
            rows.append(chunk)
            parts.append([_padded(each, tokens) for each in _draw(task, rng, len(chunk), int(size))])
    back = np.argsort(np.concatenate(rows))
    return tuple(_joined(samples, back) for samples in zip(*parts, strict=True))


def _draw(task, rng, count, size):
    instance = task.draw(rng, count, size)
    x, solution = task.features(instance), task.solve(instance)
    mask = np.ones(x.shape[:2], bool)
    clean = Sample(x, *solution, mask)
    if not task.noise_prob:
        return clean, clean
    noisy = task.disturb(rng, x)
    if task.noise_before_label:
        solution = task.solve(task.instance(noisy))
    return clean, Sample(noisy, *solution, mask)


def _padded(sample, tokens):
    missing = tokens - sample.x.shape[1]
    if not missing:
        return sample

    def pad(array, per_token):
        if array is None or not per_token:
            return array
        return np.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))

    y_has_tokens, value_has = sample.y.ndim == 2, sample.value is not None and sample.value.ndim == 2
    return Sample(
        pad(sample.x, True),
        pad(sample.y, y_has_tokens),
        pad(sample.value, value_has),
        pad(sample.mask, True),
    )


def _joined(samples, order):
    return Sample(
        *(None if parts[0] is None else np.concatenate(parts)[order] for parts in zip(*samples, strict=True))
    )
