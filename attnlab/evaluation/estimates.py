"""Estimates with standard errors from a sample of documents, in float64.

The sampling unit is the document: tokens of one document are alike, so errors computed from tokens would be too small.
"""

import numpy as np


def ratio(y: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """R = sum(y) / sum(x) over n units and its standard error; y [n], x [n] > 0.

    SE(R)^2 = n / (n - 1) * sum_d (y_d - R x_d)^2 / (sum x)^2, the linearised ("delta method") variance of a ratio
    (Cochran, Sampling Techniques, chapter 6). NaN for a sum of x of 0, and for the error of a single unit.
    """
    y, x = np.asarray(y, np.float64), np.asarray(x, np.float64)
    n, total = len(x), x.sum()
    if not total:
        return np.nan, np.nan
    R = y.sum() / total
    if n < 2:
        return float(R), np.nan
    return float(R), float(np.sqrt(n / (n - 1) * np.square(y - R * x).sum()) / total)


def mean(values: np.ndarray) -> tuple[float, float]:
    """The mean of n units and its standard error, sd / sqrt(n)."""
    return ratio(values, np.ones(len(values)))


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average of values [T] over `window` (odd) places; near the ends over as many as fit both ways.

    So it stays centred everywhere, and a straight line is returned as it is.
    """
    values = np.asarray(values, np.float64)
    places = np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(places, places[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[places + half + 1] - sums[places - half]) / (2 * half + 1)
