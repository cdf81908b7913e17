"""Tasks about order: the k-th smallest item, and the longest increasing subsequence.

Letters: N instances, n items, k a rank (1: the smallest).
"""

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.data.combinatorial.task import Solution, Task, integers, positions, whole


def kth_smallest(items: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All places of items [N, n] that hold the k-th smallest, and that item: y [N, n] and value [N], float32."""
    value = np.take_along_axis(np.sort(items, axis=1), k[:, None] - 1, 1)
    return (items == value).astype(np.float32), value[:, 0].astype(np.float32)


def increasing_length(items: np.ndarray) -> np.ndarray:
    """Length of the longest strictly increasing subsequence of items [N, n]: float32 [N]."""
    longest = np.ones(items.shape, np.float32)  # ending at each item
    for i in range(1, items.shape[1]):
        before = np.where(items[:, :i] < items[:, i : i + 1], longest[:, :i], 0)
        longest[:, i] += before.max(axis=1)
    return longest.max(axis=1)


@dataclasses.dataclass(frozen=True)
class Quickselect(Task):
    """Tokens [(item - min) / (max - min), (k-1)/(n-1)] in the order drawn; y marks the places of the k-th smallest.

    k is uniform in 2..min(largest_k, n), for long instances too. The value is in the items' own units, which
    normalised features do not show: `instance` then gives the ranks of the items. Noise adds one uniform number of
    [0, 1) to both features, and noise_range is not used.
    """

    noise_range: tuple = (0, 1)
    largest_k: int = 8
    normalize: bool = True  # False: tokens [item, k]

    num_features: ClassVar[int] = 2
    value_per_token: ClassVar[bool | None] = False
    smallest: ClassVar[int] = 2
    presets: ClassVar[dict] = {"value": {"value_range": (11, 21)}}

    def validate(self):
        self.need(self.largest_k >= 2, f"largest_k={self.largest_k} must be at least 2")
        self.need(
            self.noise_range == (0, 1), f"noise_range={self.noise_range} is fixed; noise is one of [0, 1)"
        )

    def draw(self, rng, count, size):
        items = integers(rng, self.value_range, (count, size))
        return {"items": items, "k": integers(rng, (2, min(self.largest_k, size)), count)}

    def features(self, instance):
        items, k = instance["items"], np.repeat(instance["k"][:, None], instance["items"].shape[1], axis=1)
        if self.normalize:
            low = items.min(axis=1, keepdims=True)
            items = (items - low) / np.maximum(items.max(axis=1, keepdims=True) - low, 1)
            k = (k - 1) / (k.shape[1] - 1)
        return np.stack([items, k], axis=-1).astype(np.float32)

    def instance(self, x):
        if not self.normalize:
            return {"items": whole(x[..., 0]), "k": whole(x[:, 0, 1])}
        ranks = (x[:, :, None, 0] > x[:, None, :, 0]).sum(axis=-1)
        return {"items": ranks, "k": whole(x[:, 0, 1] * (x.shape[1] - 1)) + 1}

    def solve(self, instance):
        return Solution(*kth_smallest(**instance))

    def disturb(self, rng, x):
        hit = rng.random(x.shape[:2]) < self.noise_prob
        return x + np.where(hit, rng.random(x.shape[:2]), 0).astype(x.dtype)[..., None]


@dataclasses.dataclass(frozen=True)
class LIS(Task):
    """Tokens [item, exp(i/(n-1))] in the order drawn; y is the length of the longest increasing subsequence.

    Not in the paper's tables. A single item has 0 for its place.
    """

    num_features: ClassVar[int] = 2
    per_token: ClassVar[bool] = False
    label: ClassVar[str] = "real"
    noise_before_label: ClassVar[bool] = True

    def draw(self, rng, count, size):
        return {"items": integers(rng, self.value_range, (count, size))}

    def features(self, instance):
        items = instance["items"]
        size = items.shape[1]
        place = np.broadcast_to(np.exp(positions(size)) if size > 1 else 0.0, items.shape)
        return np.stack([items, place], axis=-1).astype(np.float32)

    def instance(self, x):
        return {"items": whole(x[..., 0])}

    def solve(self, instance):
        return Solution(increasing_length(**instance), None)
