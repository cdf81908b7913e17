"""Tasks about sums of chosen items: subset sum, three sum, balanced partition, largest subset sum.

Letters: N instances, n items. The set of sums that can be reached is kept as the bits of one Python integer: adding
an item is a shift and an or, whatever the number of sums.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.data.combinatorial.task import Solution, Task, integers, whole, with_constants

TARGETS = ("dynamic", "range")


def reachable_sums(items: list[int]) -> tuple[int, int]:
    """(bits, offset): bit s + offset of `bits` is set iff some subset of the items, maybe the empty one, sums to s."""
    bits, offset = 1, 0
    for item in items:
        bits |= bits << abs(item)  # of a negative item, the upper copy is the one without it
        offset += max(-item, 0)
    return bits, offset


def subset_sum(items: np.ndarray, target: np.ndarray) -> np.ndarray:
    """1 where a subset of items [N, n] (any integers) sums to target [N], else 0: float32 [N]."""
    return np.array(
        [_has(*reachable_sums(row), goal) for row, goal in zip(items.tolist(), target.tolist(), strict=True)],
        np.float32,
    )


def three_sum(items: np.ndarray, target: np.ndarray) -> np.ndarray:
    """1 where items at three different places of [N, n] sum to target [N], else 0: float32 [N]."""
    lowest = items.min(axis=1, keepdims=True)
    goals = (target - 3 * lowest[:, 0]).tolist()
    y = np.zeros(len(items), np.float32)
    for i, row in enumerate((items - lowest).tolist()):
        one = two = three = 0  # sums of exactly so many items
        for item in row:
            three |= two << item
            two |= one << item
            one |= 1 << item
        y[i] = _has(three, 0, goals[i])
    return y


def balanced_partition(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A part of items [N, n] >= 0 that comes nearest to half of the sum from below.

    Returns the part's mask [N, n] and |sum of one part - sum of the other| [N], both float32. Ties: a sum is
    assigned the items that first made it reachable, in the order given.
    """
    mask, difference = np.zeros(items.shape, np.float32), np.zeros(len(items), np.float32)
    for row, values in enumerate(items.tolist()):
        total = sum(values)
        history = [1]  # bit s of history[i]: s is a sum of some of the first i items
        for item in values:
            history.append(history[-1] | history[-1] << item)
        rest = (history[-1] & ((2 << total // 2) - 1)).bit_length() - 1
        difference[row] = total - 2 * rest
        for i in range(len(values) - 1, -1, -1):
            if not history[i] >> rest & 1:
                mask[row, i] = 1
                rest -= values[i]
    return mask, difference


def _has(bits: int, offset: int, total: int) -> bool:
    return total + offset >= 0 and bool(bits >> (total + offset) & 1)


def _bit_array(bits: int) -> np.ndarray:
    octets = bits.to_bytes(bits.bit_length() // 8 + 1, "little")
    return np.unpackbits(np.frombuffer(octets, np.uint8), bitorder="little")


@dataclasses.dataclass(frozen=True)
class SubsetSum(Task):
    """Tokens [item, target], items ascending; y = 1 iff a subset, maybe the empty one, sums to the target.

    targets="dynamic": with probability 1/2 a uniform reachable sum, else a uniform gap between the least and the
    largest one (without gaps: up to 5 above the largest). targets="range": uniform in target_range, the paper's first
    rule, under which nearly every long instance is solvable.
    """

    value_range: tuple = (-5, 5)
    targets: str = "dynamic"
    target_range: tuple = (1, 10)  # for targets="range"

    num_features: ClassVar[int] = 2
    per_token: ClassVar[bool] = False
    presets: ClassVar[dict] = {"paper": {"targets": "range"}, "value": {"value_range": (-20, 20)}}

    def validate(self):
        self.need(self.targets in TARGETS, f"targets={self.targets!r} is unknown; choose one of {TARGETS}")

    def draw(self, rng, count, size):
        items = np.sort(integers(rng, self.value_range, (count, size)))
        if self.targets == "range":
            return {"items": items, "target": integers(rng, self.target_range, count)}
        solvable, which = rng.random(count) < 0.5, rng.random(count)
        beyond = integers(rng, (1, 5), count)
        target = [self._target(*each) for each in zip(items.tolist(), solvable, which, beyond, strict=True)]
        return {"items": items, "target": np.array(target)}

    @staticmethod
    def _target(items, solvable, which, beyond):
        bits, offset = reachable_sums(items)
        reached = _bit_array(bits)[
            : bits.bit_length()
        ]  # from the sum of all negative items to that of all others
        sums = np.flatnonzero(reached if solvable else reached == 0)
        if len(sums):
            return int(sums[int(which * len(sums))]) - offset
        return bits.bit_length() - 1 - offset + int(beyond)

    def features(self, instance):
        return with_constants(instance["items"], instance["target"])

    def instance(self, x):
        return {"items": whole(x[..., 0]), "target": whole(x[:, 0, 1])}

    def solve(self, instance):
        return Solution(subset_sum(**instance), None)


@dataclasses.dataclass(frozen=True)
class ThreeSum(Task):
    """Tokens [item, target], items ascending; y = 1 iff three different items sum to the target."""

    value_range: tuple = (-20, 20)
    target_range: tuple = (-75, 75)
    noise_range: tuple = (40, 60)

    num_features: ClassVar[int] = 2
    per_token: ClassVar[bool] = False
    presets: ClassVar[dict] = {"value": {"value_range": (-375, 375)}}

    def draw(self, rng, count, size):
        items = np.sort(integers(rng, self.value_range, (count, size)))
        return {"items": items, "target": integers(rng, self.target_range, count)}

    def features(self, instance):
        return with_constants(instance["items"], instance["target"])

    def instance(self, x):
        return {"items": whole(x[..., 0]), "target": whole(x[:, 0, 1])}

    def solve(self, instance):
        return Solution(three_sum(**instance), None)


@dataclasses.dataclass(frozen=True)
class BalancedPartition(Task):
    """Tokens [item], ascending; y marks one part of the most even split, value is the difference of the two sums."""

    value_per_token: ClassVar[bool | None] = False
    presets: ClassVar[dict] = {"value": {"value_range": (11, 100)}}

    def validate(self):
        self.need(self.value_range[0] >= 0, f"value_range={self.value_range} must not be negative")

    def draw(self, rng, count, size):
        return {"items": np.sort(integers(rng, self.value_range, (count, size)))}

    def features(self, instance):
        return with_constants(instance["items"])

    def instance(self, x):
        return {"items": whole(x[..., 0])}

    def solve(self, instance):
        return Solution(*balanced_partition(**instance))


@dataclasses.dataclass(frozen=True)
class MaxSubsetSum(Task):
    """Tokens [item], ascending; y marks the positive items, value is their sum. Not in the paper's tables."""

    value_range: tuple = (-5, 5)

    value_per_token: ClassVar[bool | None] = False
    noise_before_label: ClassVar[bool] = True

    def draw(self, rng, count, size):
        return {"items": np.sort(integers(rng, self.value_range, (count, size)))}

    def features(self, instance):
        return with_constants(instance["items"])

    def instance(self, x):
        return {"items": whole(x[..., 0])}

    def solve(self, instance):
        gains = np.maximum(instance["items"], 0)
        return Solution((gains > 0).astype(np.float32), gains.sum(axis=1).astype(np.float32))

    def disturb(self, rng, x):
        return np.sort(super().disturb(rng, x), axis=1)
