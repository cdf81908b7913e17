"""Where problems come from, by number: endless ones of a family, or a finite list, one split of either."""

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from attnlab.data.problems.problem import Family, Problem, split_of

TRIES = 1000  # draws for a problem of the right split; a tenth are of the test


class ProblemSource(Protocol):
    """One split of problems, the same for every process. Picklable."""

    finite: int | None  # how many there are; None: a new one for every number
    num_levels: int
    scores: tuple[str, ...]  # what `score` gives for them, by name

    def problem(self, number: int, level: int = 0, easier: float = 0.0) -> Problem:
        """The problem that comes `number`-th, of a level 1..num_levels, or of the source's own if level is 0.

        With probability `easier` it is of one of the lower levels instead. A finite source gives all problems of the
        level before it gives one again, each time in another order. ValueError for a level that has none.
        """
        ...

    def at(self, index: int, level: int = 0) -> Problem:
        """Random access without another order: 0..finite - 1 for level 0, any index for endless ones."""
        ...


class _Ordered:
    """What all sources share; a subclass has `at`, and `count(level)`: how many problems, or None."""

    seed: int
    num_levels: int
    where: str  # for messages

    def problem(self, number: int, level: int = 0, easier: float = 0.0) -> Problem:
        number, level = int(number), self._level(int(level))
        if easier and level > 1:
            rng = np.random.default_rng([self.seed, 2, number])
            level = int(rng.integers(1, level)) if rng.random() < easier else level
        count = self.count(level)
        if count is None:
            return self.at(number, level)
        epoch, place = divmod(number, count)
        return self.at(int(_order(self.seed, level, epoch, count)[place]), level)

    def _level(self, level: int) -> int:
        if not 0 <= level <= self.num_levels:
            raise ValueError(
                f"{self.where} has no level {level}: its levels are 1..{self.num_levels}, and 0 for its own."
            )
        return level


class GeneratedProblems(_Ordered):
    """Problems of a family, drawn anew for every (seed, stream, index, level); `size` of them if it is not None."""

    def __init__(
        self, family: Family, split: str, *, level: int, size: int | None, seed: int, stream: int, where: str
    ):
        self.family, self.split, self.level, self.finite = family, split, level, size
        self.seed, self.stream, self.where = seed, stream, where
        self.num_levels, self.scores = family.num_levels, family.scores

    def count(self, level: int) -> int | None:
        return self.finite

    def at(self, index: int, level: int = 0) -> Problem:
        level = self._level(level)
        rng = np.random.default_rng([self.seed, 0, self.stream, level, index])
        for _ in range(TRIES):
            problem = self.family.sample(rng, level)
            if split_of(problem.identity) == self.split:
                return problem
        raise ValueError(
            f"{self.where} has hardly a problem of level {level} in split {self.split!r} ({TRIES} tries): "
            "its problems are too few, ask for a higher level."
        )

    def _level(self, level: int) -> int:
        return super()._level(level) or self.level


class ListedProblems(_Ordered):
    """A list of problems; its own level, 0, is all of them."""

    scores = ("exact",)

    def __init__(self, problems: Sequence[Problem], *, seed: int, where: str):
        self.seed, self.where = seed, where
        self.num_levels, self.finite = max(problem.level for problem in problems), len(problems)
        self._levels = {0: list(problems)}
        for problem in problems:
            self._levels.setdefault(problem.level, []).append(problem)

    def count(self, level: int) -> int:
        if level not in self._levels:
            raise ValueError(
                f"{self.where} has no problem of level {level}, only of {sorted(self._levels)[1:]}."
            )
        return len(self._levels[level])

    def at(self, index: int, level: int = 0) -> Problem:
        self.count(level)
        return self._levels[level][index]


@functools.lru_cache(maxsize=16)
def _order(seed: int, level: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 1, level, epoch]).permutation(count)
