"""Tasks about filling a budget: knapsack, fractional knapsack, coin change with single coins, bin packing.

Letters: N instances, n items, R entries of a table over budgets 0..R-1. Tables are filled for all instances at once.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.data.combinatorial.task import (
    Solution,
    Task,
    choose,
    integers,
    positions,
    whole,
    with_constants,
)

UNREACHABLE = 1 << 40  # a count of coins that no sum has


def knapsack(values: np.ndarray, weights: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items of largest total value whose weights fit the capacity: mask [N, n] and best value [N], float32.

    values, weights [N, n] >= 0 and capacity [N] are integers. Ties: from the last item backwards, an item is taken
    only if the items before it cannot reach the same value.
    """
    best = [
        np.zeros((len(values), int(capacity.max()) + 1), np.int64)
    ]  # best[i][:, c]: from the first i items
    for value, weight in zip(values.T, weights.T, strict=True):
        best.append(np.maximum(best[-1], _spent(best[-1], weight, -1 - value.max()) + value[:, None]))
    taken = [now != before for before, now in zip(best[:-1], best[1:], strict=True)]
    return _trace_back(taken, weights, capacity), _at(best[-1], capacity).astype(np.float32)


def fractional_knapsack(
    values: np.ndarray, weights: np.ndarray, capacity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of items that fill the capacity with the largest value: shares [N, n] and value [N], float64.

    Greedy by value/weight, ties in the order given. values, weights [N, n] with weights > 0, capacity [N].
    """
    order = np.argsort(-(values / weights), axis=1, kind="stable")
    sorted_weights = np.take_along_axis(weights, order, 1)
    before = np.cumsum(sorted_weights, axis=1) - sorted_weights
    shares = np.clip((capacity[:, None] - before) / sorted_weights, 0, 1)
    fractions = np.empty_like(shares)
    np.put_along_axis(fractions, order, shares, 1)
    return fractions, (fractions * values).sum(axis=1)


def coin_counts(coins: np.ndarray, largest: int) -> list[np.ndarray]:
    """counts[i][:, t]: fewest of the first i coins (each used once) that make t, or UNREACHABLE; [N, largest + 1]."""
    start = np.full((len(coins), largest + 1), UNREACHABLE, np.int64)
    start[:, 0] = 0
    counts = [start]
    for coin in coins.T:
        counts.append(np.minimum(counts[-1], _spent(counts[-1], coin, UNREACHABLE) + 1))
    return counts


def min_coin_change(coins: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A smallest set of coins [N, n] > 0 with sum target [N]: mask [N, n] and size [N], float32; zeros if impossible.

    Ties: from the last coin backwards, a coin is taken only if the coins before it need more.
    """
    counts = coin_counts(coins, int(target.max()))
    taken = [now < before for before, now in zip(counts[:-1], counts[1:], strict=True)]
    size = _at(counts[-1], target)
    return _trace_back(taken, coins, target), np.where(size < UNREACHABLE, size, 0).astype(np.float32)


def first_fit(sizes: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items in the order given, each into the first bin with room: y [N, n] and number of bins [N], float32.

    y is 1 where an item opens a bin. sizes [N, n], 0 < size <= capacity [N]; ValueError for a larger item.
    """
    if (sizes > capacity[:, None]).any():
        raise ValueError(f"an item of size {sizes.max()} is larger than its bin; clip sizes to the capacity")
    room = np.repeat(capacity[:, None], sizes.shape[1], axis=1)
    opened = np.zeros(len(sizes), np.int64)
    opens, rows = np.zeros(sizes.shape, np.float32), np.arange(len(sizes))
    for i, size in enumerate(sizes.T):
        place = np.argmax(room >= size[:, None], axis=1)
        room[rows, place] -= size
        opens[:, i] = place == opened
        opened += place == opened
    return opens, opened.astype(np.float32)


def _spent(table, cost, outside):
    """table[:, c - cost] for each budget c, `outside` where that is negative; table [N, R], cost [N]."""
    budget = np.arange(table.shape[1]) - cost[:, None]
    return np.where(budget >= 0, np.take_along_axis(table, np.maximum(budget, 0), 1), outside)


def _at(table, budget):
    return np.take_along_axis(table, budget[:, None], 1)[:, 0]


def _trace_back(taken, costs, budget):
    """Mask float32 [N, n] of the items found by walking from the last one; taken: n tables bool [N, R]."""
    mask = np.zeros(costs.shape, np.float32)
    for i in range(len(taken) - 1, -1, -1):
        mask[:, i] = _at(taken[i], budget)
        budget = budget - np.where(mask[:, i] > 0, costs[:, i], 0)
    return mask


@dataclasses.dataclass(frozen=True)
class Knapsack(Task):
    """Tokens [value, weight, capacity], by ascending value (stable); y marks the chosen items."""

    weight_range: tuple = (1, 10)
    target_range: tuple = (10, 20)  # of the capacity

    num_features: ClassVar[int] = 3
    value_per_token: ClassVar[bool | None] = False
    presets: ClassVar[dict] = {"value": {"value_range": (11, 21)}}

    def validate(self):
        lows = (self.value_range[0], self.weight_range[0] - 1, self.target_range[0])
        sentence = (
            f"values {self.value_range}, weights {self.weight_range} and capacities {self.target_range}"
        )
        self.need(min(lows) >= 0, f"{sentence} must not be negative, nor weights 0")

    def draw(self, rng, count, size):
        values = integers(rng, self.value_range, (count, size))
        weights = integers(rng, self.weight_range, (count, size))
        order = np.argsort(values, axis=1, kind="stable")
        values, weights = (np.take_along_axis(each, order, 1) for each in (values, weights))
        return {
            "values": values,
            "weights": weights,
            "capacity": integers(rng, self.target_range, count),
        }

    def features(self, instance):
        return with_constants(np.stack([instance["values"], instance["weights"]], -1), instance["capacity"])

    def instance(self, x):
        return {"values": whole(x[..., 0]), "weights": whole(x[..., 1]), "capacity": whole(x[:, 0, 2])}

    def solve(self, instance):
        return Solution(*knapsack(**instance))

    def disturb(self, rng, x):
        x = self.add_noise(rng, x, 2)
        x[..., 1] = np.maximum(x[..., 1], 1)
        return x


@dataclasses.dataclass(frozen=True)
class FractionalKnapsack(Knapsack):
    """As Knapsack, but y holds the share of each item that is taken, and value is log(1 + best value)."""

    label: ClassVar[str] = "fractions"
    published_target: ClassVar[str] = "value"
    presets: ClassVar[dict] = Knapsack.presets | {"paper_noise": {"noise_range": (1, 5)}}

    def solve(self, instance):
        fractions, best = fractional_knapsack(**instance)
        return Solution(fractions.astype(np.float32), np.log1p(best).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class MinCoinChange(Task):
    """Tokens [coin, target], coins ascending; y marks a smallest set of coins that makes the target exactly.

    The target is, with probability 1/2 each, a uniform one of target_range that can be made or one that cannot;
    if there is none of the one kind it is of the other.
    """

    target_range: tuple = (10, 20)

    num_features: ClassVar[int] = 2
    value_per_token: ClassVar[bool | None] = False
    presets: ClassVar[dict] = {
        "value": {"value_range": (11, 21)},
        "paper_noise": {"noise_range": (1, 5)},
    }

    def validate(self):
        sentence = f"coins {self.value_range} and targets {self.target_range} must be positive"
        self.need(self.value_range[0] > 0 and self.target_range[0] > 0, sentence)

    def draw(self, rng, count, size):
        coins = np.sort(integers(rng, self.value_range, (count, size)))
        low, high = self.target_range
        possible = coin_counts(coins, high)[-1][:, low:] < UNREACHABLE
        wanted = (rng.random(count) < 0.5)[:, None]
        first = choose(rng, possible == wanted)
        second = choose(rng, possible != wanted)
        return {"coins": coins, "target": low + np.where(first >= 0, first, second)}

    def features(self, instance):
        return with_constants(instance["coins"], instance["target"])

    def instance(self, x):
        return {"coins": whole(x[..., 0]), "target": whole(x[:, 0, 1])}

    def solve(self, instance):
        return Solution(*min_coin_change(**instance))

    def disturb(self, rng, x):
        x = super().disturb(rng, x)
        x[..., 0] = np.maximum(x[..., 0], 1)
        return x


@dataclasses.dataclass(frozen=True)
class BinPacking(Task):
    """Tokens [size, capacity, i/(n-1)], sizes descending and clipped to the bin; y marks items that open a bin."""

    target_range: tuple = (10, 30)  # of the capacity

    num_features: ClassVar[int] = 3
    value_per_token: ClassVar[bool | None] = False
    presets: ClassVar[dict] = {"value": {"value_range": (11, 100)}}

    def validate(self):
        self.need(self.target_range[0] >= 1, f"target_range={self.target_range} must be positive")

    def draw(self, rng, count, size):
        capacity = integers(rng, self.target_range, count)
        sizes = np.clip(integers(rng, self.value_range, (count, size)), 1, capacity[:, None])
        return {"sizes": -np.sort(-sizes, axis=1), "capacity": capacity}

    def features(self, instance):
        x = with_constants(instance["sizes"], instance["capacity"], instance["capacity"])
        x[..., 2] = positions(x.shape[1])
        return x

    def instance(self, x):
        return {"sizes": whole(x[..., 0]), "capacity": whole(x[:, 0, 1])}

    def solve(self, instance):
        return Solution(*first_fit(**instance))

    def disturb(self, rng, x):
        x = super().disturb(rng, x)
        x[..., 0] = np.clip(x[..., 0], 1, x[..., 1])
        return x
