"""Brackets that are open, and the sequence that closes them: `([<()=` wants `>])`. The level is how many are open."""

import dataclasses
from typing import ClassVar

from attnlab.data.problems.problem import Family, text_scores

PAIRS = ("()", "[]", "{}", "<>")


@dataclasses.dataclass(frozen=True)
class Dyck(Family):
    """The one way to close all open brackets."""

    kinds: int = 4  # of brackets
    closed: int = 0  # pairs in the question that are closed already

    name: ClassVar[str] = "dyck"
    scores: ClassVar[tuple[str, ...]] = ("exact", "position_fraction")
    num_levels: ClassVar[int] = 64
    usual_level: ClassVar[int] = 6

    def validate(self):
        self.need(1 <= self.kinds <= len(PAIRS), f"kinds={self.kinds} must lie in 1..{len(PAIRS)}")
        self.need(0 <= self.closed <= 1000, f"closed={self.closed} must lie in 0..1000")

    def sample(self, rng, level):
        opens, closes = level + self.closed, self.closed  # that are still to come
        text, stack = "", []
        while opens + closes:
            if stack and rng.random() * (opens + closes) < closes or not opens:
                text, closes = text + stack.pop()[1], closes - 1
            else:
                stack.append(PAIRS[rng.integers(self.kinds)])
                text, opens = text + stack[-1][0], opens - 1
        return self.problem(f"{text}=", "".join(pair[1] for pair in reversed(stack)), level)

    @staticmethod
    def score(text, problem):
        return text_scores(text, problem.answer, "position_fraction")
