"""Tasks on graphs: shortest paths between all pairs, and strongly connected components.

Letters: N instances, n nodes; T = n*n tokens, row by row, token (i, j) = [w_ij, i/(n-1), j/(n-1)].
"""

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.data.combinatorial.task import Solution, Task, integers, positions, whole

WEIGHTS = ("sparse", "complete")


def floyd_warshall(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shortest paths of directed graphs: distances float64 [N, n, n] (inf: none) and predecessors int64 [N, n, n].

    weights [N, n, n] >= 0, inf where there is no edge; the diagonal is not read. The predecessor of (i, j) is the
    node before j on the path from i, and n where there is none (i = j too). Ties keep the path found first.
    """
    size = weights.shape[1]
    here = np.eye(size, dtype=bool)
    distance = np.where(here, 0.0, weights)
    edge = np.isfinite(distance) & ~here
    before = np.where(edge, np.arange(size)[:, None], size)
    for k in range(size):
        through = distance[:, :, k, None] + distance[:, k, None, :]
        shorter = through < distance
        distance = np.where(shorter, through, distance)
        before = np.where(shorter, before[:, k, None, :], before)
    return distance, before


def same_component(edges: np.ndarray) -> np.ndarray:
    """1 where i and j of directed graphs [N, n, n] (bool or 0/1) reach each other, else 0: float32 [N, n, n]."""
    size = edges.shape[1]
    reach = edges.astype(bool) | np.eye(size, dtype=bool)
    for k in range(size):
        reach |= reach[:, :, k, None] & reach[:, k, None, :]
    return (reach & reach.transpose(0, 2, 1)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class GraphTask(Task):
    """Base of both: tokens are the entries of a matrix [N, n, n] and their place."""

    num_features: ClassVar[int] = 3
    sizes: ClassVar[tuple] = (8, 16)

    def tokens(self, size):
        return size * size

    @staticmethod
    def matrix_tokens(matrix: np.ndarray) -> np.ndarray:
        """[N, n, n] -> x [N, n*n, 3] float32."""
        count, size = matrix.shape[:2]
        place = positions(size)
        rows, columns = np.broadcast_to(place[:, None], matrix.shape), np.broadcast_to(place, matrix.shape)
        return np.stack([matrix, rows, columns], -1).reshape(count, size * size, 3).astype(np.float32)

    @staticmethod
    def matrix(x: np.ndarray) -> np.ndarray:
        """x [N, n*n, 3] -> its first feature as [N, n, n]; ValueError if T is no square."""
        size = round(x.shape[1] ** 0.5)
        if size * size != x.shape[1]:
            raise ValueError(f"{x.shape[1]} tokens are no square matrix; give n*n tokens, row by row")
        return x[..., 0].reshape(-1, size, size)

    def hit(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        """Tokens off the diagonal that noise falls on: bool [N, T]."""
        size = round(x.shape[1] ** 0.5)
        return (rng.random(x.shape[:2]) < self.noise_prob) & ~np.eye(size, dtype=bool).reshape(-1)


@dataclasses.dataclass(frozen=True)
class FloydWarshall(GraphTask):
    """All shortest paths of undirected graphs; y holds predecessors (n: none), value the distances.

    weights="sparse": an edge has probability p^2, p uniform in edge_range, and a real weight, the geometric mean of
    two uniform numbers of value_range. weights="complete": the paper's first rule, all w_ij integers of value_range,
    drawn for (i, j) and (j, i) apart, of which the smaller one counts. No edge is shown as 0; the distance of
    unreachable nodes is n * largest weight + 1.
    """

    value_range: tuple = (1, 15)
    noise_range: tuple = (10, 20)
    weights: str = "sparse"
    edge_range: tuple = (0.5, 0.9)

    label: ClassVar[str] = "classes"
    value_per_token: ClassVar[bool | None] = True
    published_target: ClassVar[str] = "value"
    presets: ClassVar[dict] = {
        "paper": {"weights": "complete"},
        "value": {"value_range": (16, 30)},
        "paper_noise": {"noise_range": (1, 10)},
    }

    def validate(self):
        self.need(self.weights in WEIGHTS, f"weights={self.weights!r} is unknown; choose one of {WEIGHTS}")
        self.need(self.value_range[0] >= 0, f"value_range={self.value_range} must not be negative")
        positive = self.weights == "sparse" or self.value_range[0] > 0  # 0 stands for no edge
        self.need(positive, f"value_range={self.value_range} must be positive for weights='complete'")
        low, high = self.edge_range
        self.need(0 <= low <= high <= 1, f"edge_range={self.edge_range} must hold probabilities")

    def draw(self, rng, count, size):
        shape, here = (count, size, size), np.eye(size, dtype=bool)
        if self.weights == "complete":
            return {"weights": np.where(here, np.inf, integers(rng, self.value_range, shape))}
        p = rng.uniform(*self.edge_range, (count, 1, 1))
        edge = rng.random(shape) < p
        edge &= edge.transpose(0, 2, 1)
        drawn = rng.uniform(*self.value_range, shape)
        weight = np.sqrt(drawn * drawn.transpose(0, 2, 1) + 1e-6)
        rounded = weight.astype(np.float32).astype(np.float64)  # labels belong to the weights that are shown
        return {"weights": np.where(edge & ~here, rounded, np.inf)}

    def features(self, instance):
        weights = instance["weights"]
        return self.matrix_tokens(np.where(np.isfinite(weights), weights, 0))

    def instance(self, x):
        matrix = self.matrix(x).astype(np.float64)
        return {"weights": np.where(matrix > 0, matrix, np.inf)}

    def solve(self, instance):
        weights = instance["weights"]
        distance, before = floyd_warshall(np.minimum(weights, weights.transpose(0, 2, 1)))
        count, size = weights.shape[:2]
        distance[np.isinf(distance)] = size * self.value_range[1] + 1
        flat = (count, size * size)
        return Solution(before.reshape(flat).astype(np.int32), distance.reshape(flat).astype(np.float32))

    def disturb(self, rng, x):
        low, high = self.noise_range
        if self.weights == "complete":
            noise = integers(rng, self.noise_range, x.shape[:2])
        else:
            noise = rng.uniform(low, high, x.shape[:2])
        x = x.copy()
        x[..., 0] = np.maximum(x[..., 0] + np.where(self.hit(rng, x), noise, 0).astype(x.dtype), 0)
        return x


@dataclasses.dataclass(frozen=True)
class SCC(GraphTask):
    """Strongly connected components of random communities; y marks pairs (i, j) of one component.

    Nodes are split at random into k communities of nearly equal size, k uniform in 1..max(1, n // 2); a directed edge
    has probability `inside` within a community and `across` between two. Noise flips edges. value_range and
    noise_range are not used.
    """

    value_range: tuple = (0, 1)
    noise_range: tuple = (0, 1)
    inside: float = 0.6
    across: float = 0.05

    presets: ClassVar[dict] = {"paper": {"inside": 0.001}, "value": {"inside": 0.1}}

    def validate(self):
        ranges = (self.value_range, self.noise_range)
        self.need(ranges == ((0, 1), (0, 1)), f"value and noise ranges are fixed to (0, 1), got {ranges}")
        for name in ("inside", "across"):
            p = getattr(self, name)
            self.need(0 <= p <= 1, f"{name}={p} is no probability; use one in [0, 1]")

    def draw(self, rng, count, size):
        communities = integers(rng, (1, max(1, size // 2)), count)[:, None]
        place = rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)
        small, larger = size // communities, size % communities  # the first `larger` ones have one node more
        split = larger * (small + 1)
        group = np.where(place < split, place // (small + 1), larger + (place - split) // small)
        p = np.where(group[:, :, None] == group[:, None, :], self.inside, self.across)
        return {"edges": (rng.random(p.shape) < p) & ~np.eye(size, dtype=bool)}

    def features(self, instance):
        return self.matrix_tokens(instance["edges"])

    def instance(self, x):
        return {"edges": whole(self.matrix(x)) != 0}

    def solve(self, instance):
        same = same_component(instance["edges"])
        return Solution(same.reshape(len(same), -1), None)

    def disturb(self, rng, x):
        x = x.copy()
        x[..., 0] = np.where(self.hit(rng, x), 1 - x[..., 0], x[..., 0])
        return x
