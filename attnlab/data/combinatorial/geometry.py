"""The convex hull of points in the plane.

Letters: N instances, n points. Coordinates are integers, so that every comparison is exact.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.data.combinatorial.task import Solution, Task, integers, whole


def convex_hull(points: np.ndarray) -> np.ndarray:
    """1 for every point of [N, n, 2] (integers) at a vertex of its instance's hull, else 0: float32 [N, n].

    Points inside an edge are no vertices; all copies of a vertex are. Monotone chain, all instances in step.
    """
    points = points.astype(np.int64)
    x, y = points[..., 0], points[..., 1]
    span = y.max() - y.min() + 1
    key = x * span + y  # orders by x, then y
    order = np.argsort(key, axis=1, kind="stable")
    ranked = np.take_along_axis(points, order[..., None], 1)
    vertex = _chain(ranked) | _chain(ranked[:, ::-1])[:, ::-1]
    first = np.diff(np.take_along_axis(key, order, 1), axis=1, prepend=np.iinfo(np.int64).min) != 0
    place = np.cumsum(first, axis=1) - 1  # number of a point's place, equal for copies
    rows = np.arange(len(points))[:, None]
    taken = np.zeros(vertex.shape, bool)
    np.logical_or.at(taken, (rows, place), vertex)
    result = np.empty(vertex.shape, np.float32)
    np.put_along_axis(result, order, taken[rows, place].astype(np.float32), 1)
    return result


def _chain(points):
    """bool [N, n]: points kept on the left-turning chain through points [N, n, 2], given in order along x."""
    count, size = points.shape[:2]
    stack, height, rows = np.zeros((count, size), np.int64), np.zeros(count, np.int64), np.arange(count)
    for i in range(size):
        while True:
            top, below = (points[rows, stack[rows, np.maximum(height - back, 0)]] for back in (1, 2))
            edge, step = top - below, points[:, i] - below
            turn = edge[:, 0] * step[:, 1] - edge[:, 1] * step[:, 0]
            pop = (height >= 2) & (turn <= 0)
            if not pop.any():
                break
            height -= pop
        stack[rows, height] = i
        height += 1
    kept = np.zeros((count, size), bool)
    np.logical_or.at(kept, (rows[:, None], stack), np.arange(size) < height[:, None])
    return kept


@dataclasses.dataclass(frozen=True)
class ConvexHull(Task):
    """Tokens [x, y] in the order drawn; y marks the vertices of the hull."""

    value_range: tuple = (0, 10)

    num_features: ClassVar[int] = 2
    presets: ClassVar[dict] = {
        "value": {"value_range": (11, 21)},
        "paper_noise": {"noise_range": (1, 5)},
    }

    def draw(self, rng, count, size):
        return {"points": integers(rng, self.value_range, (count, size, 2))}

    def features(self, instance):
        return instance["points"].astype(np.float32)

    def instance(self, x):
        return {"points": whole(x)}

    def solve(self, instance):
        return Solution(convex_hull(**instance), None)

    def disturb(self, rng, x):
        return self.add_noise(rng, x, 2)
