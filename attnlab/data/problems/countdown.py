"""Countdown: reach a target with all given digits, `375:22=` by `3*5+7`. The level is how many digits there are."""

import dataclasses
from typing import ClassVar

from attnlab.data.problems.expressions import parse, random_expression
from attnlab.data.problems.problem import Family

LARGEST = 99  # target


@dataclasses.dataclass(frozen=True)
class Countdown(Family):
    """Digits 1..9 and a target 0..99 that some expression of them has: a random one, which is the solution.

    Any expression of + - * and exact / is right that has the target as its value and every digit exactly once, with
    brackets or without.
    """

    brackets: bool = False  # solutions, and so targets, may need them

    name: ClassVar[str] = "countdown"
    scores: ClassVar[tuple[str, ...]] = ("exact", "well_formed")
    num_levels: ClassVar[int] = 8
    usual_level: ClassVar[int] = 3

    def sample(self, rng, level):
        while True:  # about one expression in two has a value in range
            digits = rng.integers(1, 10, level).tolist()
            solution = random_expression(rng, digits, self.brackets)
            target = parse(solution).value
            if target is not None and 0 <= target <= LARGEST:
                break
        question = "".join(map(str, digits))
        identity = f"{''.join(sorted(question))}:{target}"
        return self.problem(
            f"{question}:{target}=", target, level, solution=solution, identity=identity, digits=digits
        )

    @staticmethod
    def score(text, problem):
        found = parse(text)
        formed = found is not None and sorted(found.numbers) == sorted(problem.meta["digits"])
        return {"exact": float(formed and found.value == problem.answer), "well_formed": float(formed)}
