"""Problems whose answer is one string: sums, chains of operations, and digits sorted, copied or reversed.

add      37+58=              95            level: digits of the longer addend, at most
chain    ((7+3)*4-9)%11=     9             level: operations before the remainder
sort     518203=             012358        level: digits
copy     518203=             518203        reverse the same, backwards
"""

import dataclasses
from typing import ClassVar

from attnlab.data.problems.problem import Family, text_scores


@dataclasses.dataclass(frozen=True)
class Add(Family):
    """The sum of two numbers."""

    reverse: bool = False  # the answer begins with its least significant digit

    name: ClassVar[str] = "add"
    scores: ClassVar[tuple[str, ...]] = ("exact", "digit_fraction")
    num_levels: ClassVar[int] = 18
    usual_level: ClassVar[int] = 2

    def sample(self, rng, level):
        a, b = (int(x) for x in rng.integers(0, 10**level, 2))
        answer = str(a + b)
        answer = answer[::-1] if self.reverse else answer
        return self.problem(f"{a}+{b}=", answer, level, identity=f"{min(a, b)}+{max(a, b)}")

    @staticmethod
    def score(text, problem):
        return text_scores(text, problem.answer, "digit_fraction")


@dataclasses.dataclass(frozen=True)
class Chain(Family):
    """Digits added, subtracted and multiplied from the left, and what remains of a division by the modulus."""

    modulus: int = 11

    name: ClassVar[str] = "chain"
    num_levels: ClassVar[int] = 32
    usual_level: ClassVar[int] = 3

    def validate(self):
        self.need(2 <= self.modulus <= 10**6, f"modulus={self.modulus} must lie in 2..1000000")

    def sample(self, rng, level):
        value = int(rng.integers(1, 10))
        text, loose = str(value), False  # loose: a product would not take all of the text
        for sign, digit in zip(rng.integers(0, 3, level), rng.integers(1, 10, level).tolist(), strict=True):
            sign = "+-*"[sign]
            if sign == "*":
                text, value = (f"({text})" if loose else text) + f"*{digit}", value * digit
            else:
                text, value = f"{text}{sign}{digit}", value + (digit if sign == "+" else -digit)
            loose = sign != "*"
        return self.problem(f"({text})%{self.modulus}=", str(value % self.modulus), level)

    @staticmethod
    def score(text, problem):
        return {"exact": text_scores(text, problem.answer, "places")["exact"]}


@dataclasses.dataclass(frozen=True)
class Digits(Family):
    """A string of random digits and what becomes of it."""

    noise: float = (
        0.0  # the solution is shuffled with this probability: demonstrations that leave room to learn
    )

    scores: ClassVar[tuple[str, ...]] = ("exact", "position_fraction")
    num_levels: ClassVar[int] = 64
    usual_level: ClassVar[int] = 6

    def validate(self):
        self.need(0 <= self.noise <= 1, f"noise={self.noise} is no probability; use one in [0, 1]")

    def sample(self, rng, level):
        digits = "".join(map(str, rng.integers(0, 10, level)))
        answer = self.answer(digits)
        noisy = rng.random() < self.noise
        solution = "".join(rng.permutation(list(answer))) if noisy else answer
        return self.problem(f"{digits}=", answer, level, solution=solution)

    @staticmethod
    def answer(digits: str) -> str:
        """The right completion."""
        raise NotImplementedError

    @staticmethod
    def score(text, problem):
        return text_scores(text, problem.answer, "position_fraction")


class Sort(Digits):
    """Digits in ascending order."""

    name: ClassVar[str] = "sort"

    @staticmethod
    def answer(digits):
        return "".join(sorted(digits))


class Copy(Digits):
    """The same digits."""

    name: ClassVar[str] = "copy"

    @staticmethod
    def answer(digits):
        return digits


class Reverse(Digits):
    """The digits from the last to the first."""

    name: ClassVar[str] = "reverse"

    @staticmethod
    def answer(digits):
        return digits[::-1]
