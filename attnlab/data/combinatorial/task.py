"""What a combinatorial task is: how instances are drawn, shown to a model, disturbed and solved.

Letters: N instances, n size of an instance (items, points or nodes), T tokens (n, or n*n for graphs), F features.

    instance = draw(rng, N, n)        integers by name, such as {"items": [N, n], "target": [N]}
    x        = features(instance)     float32 [N, T, F], what a model sees
    instance = instance(x)            back again, where the features hold all of it
    y, value = solve(instance)        the label, and the optimal value where a task has one
    x'       = disturb(rng, x)        noise, added after the label is known unless `noise_before_label`
The tasks, their order of items and their rules for ties are those of Tropical Attention, arXiv 2505.17190.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import numpy as np

Range = tuple[int, int]  # both ends belong to it
Instance = dict[str, np.ndarray]


class Solution(NamedTuple):
    """y: label of each instance [N] or token [N, T]; value: optimal value [N] (distances: [N, T]), or None."""

    y: np.ndarray
    value: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Task:
    """Base of all tasks; the fields are the options all of them share."""

    value_range: tuple = (1, 10)  # of items, coordinates or weights
    noise_prob: float = 0.0  # a token is disturbed with this probability
    noise_range: tuple = (10, 30)  # what is then added

    num_features: ClassVar[int] = 1  # F
    per_token: ClassVar[bool] = True  # y has an entry a token; False: one an instance
    label: ClassVar[str] = (
        "binary"  # what y holds: "binary" 0/1, "classes" 0..n, "fractions" in [0, 1], "real"
    )
    value_per_token: ClassVar[bool | None] = None  # the same of the optimal value; None: there is none
    published_target: ClassVar[str] = "label"  # what the paper trains on and reports: "label" or "value"
    noise_before_label: ClassVar[bool] = False  # the label belongs to the disturbed instance
    sizes: ClassVar[Range] = (8, 64)  # n in training, and in the paper's test of longer instances
    smallest: ClassVar[int] = 1  # least n
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # options of the paper's other conditions, by name

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name.endswith("_range"):
                low, high = getattr(self, field.name)
                object.__setattr__(self, field.name, (low, high))  # a list, as JSON has it, becomes a tuple
                self.need(low <= high, f"{field.name}=({low}, {high}) is empty; write the smaller end first")
        self.need(
            0 <= self.noise_prob <= 1, f"noise_prob={self.noise_prob} is no probability; use one in [0, 1]"
        )
        self.validate()

    def need(self, condition: bool, sentence: str) -> None:
        """ValueError with the task's name and the sentence unless the condition holds."""
        if not condition:
            raise ValueError(f"{type(self).__name__}: {sentence}")

    def validate(self) -> None:
        """ValueError for options that the task cannot have."""

    def draw(self, rng: np.random.Generator, count: int, size: int) -> Instance:
        """`count` random instances of `size`; all arrays begin with the axis N."""
        raise NotImplementedError

    def features(self, instance: Instance) -> np.ndarray:
        """x [N, T, F] float32."""
        raise NotImplementedError

    def instance(self, x: np.ndarray) -> Instance:
        """The instance of undisturbed features x [N, T, F]; the inverse of `features` but for lost units."""
        raise NotImplementedError

    def solve(self, instance: Instance) -> Solution:
        """Labels (float32, or int32 for classes) and values (float32)."""
        raise NotImplementedError

    def disturb(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        """A copy of x in which every token got noise with probability noise_prob: here, in its first feature."""
        return self.add_noise(rng, x, 1)

    def add_noise(self, rng: np.random.Generator, x: np.ndarray, columns: int) -> np.ndarray:
        """A copy of x with an integer of noise_range added, in hit tokens, to each of the first `columns`."""
        hit = rng.random(x.shape[:2]) < self.noise_prob
        noise = integers(rng, self.noise_range, (*x.shape[:2], columns))
        x = x.copy()
        x[..., :columns] += np.where(hit[..., None], noise, 0).astype(x.dtype)
        return x

    def tokens(self, size: int) -> int:
        """T of an instance of `size`."""
        return size


def integers(rng: np.random.Generator, bounds: Range, shape) -> np.ndarray:
    """Uniform integers int64 of the shape, both ends of `bounds` included."""
    return rng.integers(bounds[0], bounds[1], shape, endpoint=True)


def whole(x: np.ndarray) -> np.ndarray:
    """Features back to integers, int64."""
    return np.rint(x).astype(np.int64)


def with_constants(items: np.ndarray, *constants: np.ndarray) -> np.ndarray:
    """Tokens float32 [N, n, F]: items [N, n] or [N, n, f], then constants [N] of the instance, in every token."""
    items = items[..., None] if items.ndim == 2 else items
    tail = [np.broadcast_to(c[:, None, None], (*items.shape[:2], 1)) for c in constants]
    return np.concatenate([items, *tail], axis=-1).astype(np.float32)


def positions(size: int) -> np.ndarray:
    """i / (n - 1) for i = 0..n-1, float64 [n]; 0 for a single one."""
    return np.arange(size) / max(size - 1, 1)


def choose(rng: np.random.Generator, allowed: np.ndarray) -> np.ndarray:
    """For each row of allowed [N, R] (bool) the index of a uniformly chosen True, or -1: int64 [N]."""
    count = allowed.sum(axis=1)
    rank = np.floor(rng.random(len(allowed)) * count).astype(np.int64)
    index = np.argmax(np.cumsum(allowed, axis=1) == rank[:, None] + 1, axis=1)
    return np.where(count > 0, index, -1)
