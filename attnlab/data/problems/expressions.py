"""Arithmetic expressions of text: a parser of its own, which runs nothing, and random expressions that it can read.

    sum     = product (("+" | "-") product)*
    product = atom (("*" | "/") atom)*
    atom    = number | "(" sum ")"             numbers are ASCII digits; blanks may stand between the parts

Values are integers: a division that leaves a remainder, or by zero, has none.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_LENGTH = 256  # characters
MAX_DEPTH = 32  # brackets in brackets
_PARTS = re.compile(r"([0-9]{1,6}(?![0-9])|[-+*/()])[ ]*")


class Expression(NamedTuple):
    """numbers: as they stand in the text, from the left; value: None if a division fails."""

    numbers: list[int]
    value: int | None


def parse(text: str) -> Expression | None:
    """The expression that the text is, or None if it is none, or too long or too deep to be looked at."""
    text = text.strip(" \t\r\n") if len(text) <= MAX_LENGTH else ""
    parts, place = [], 0
    while place < len(text):
        match = _PARTS.match(text, place)
        if match is None:
            return None
        parts.append(match[1])
        place = match.end()
    reader = _Reader(parts)
    value = reader.sum(0)
    if reader.failed or reader.place < len(parts):
        return None
    return Expression(reader.numbers, value)


class _Reader:
    """Recursive descent over parts; `failed` once they are no expression, after which values mean nothing."""

    def __init__(self, parts: list[str]):
        self.parts, self.place, self.numbers, self.failed = parts, 0, [], False

    def next(self, wanted: str) -> str:
        """Take the next part if it is one of the characters wanted, else return ""."""
        part = self.parts[self.place] if self.place < len(self.parts) else ""
        if not part or part not in wanted:
            return ""
        self.place += 1
        return part

    def sum(self, depth: int) -> int | None:
        value = self.product(depth)
        while sign := self.next("+-"):
            value = apply(sign, value, self.product(depth))
        return value

    def product(self, depth: int) -> int | None:
        value = self.atom(depth)
        while sign := self.next("*/"):
            value = apply(sign, value, self.atom(depth))
        return value

    def atom(self, depth: int) -> int | None:
        if self.next("("):
            value = self.sum(depth + 1) if depth < MAX_DEPTH else None
            self.failed |= depth >= MAX_DEPTH or not self.next(")")
            return value
        part = self.parts[self.place] if self.place < len(self.parts) else ""
        if not part.isdigit():
            self.failed = True
            return None
        self.place += 1
        self.numbers.append(int(part))
        return self.numbers[-1]


def apply(sign: str, a: int | None, b: int | None) -> int | None:
    """a sign b, or None where an operand or an exact quotient is missing."""
    if a is None or b is None:
        return None
    if sign == "/":
        return a // b if b and a % b == 0 else None
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def random_expression(rng: np.random.Generator, numbers: Sequence[int], brackets: bool) -> str:
    """The numbers in random order with random signs between them, and a random shape if brackets may be used."""
    numbers = [str(n) for n in rng.permutation(numbers)]
    signs = ["+-*/"[i] for i in rng.integers(0, 4, len(numbers) - 1)]
    if brackets:
        return _shape(rng, numbers, signs)[0]
    return numbers[0] + "".join(sign + n for sign, n in zip(signs, numbers[1:], strict=True))


def _shape(rng: np.random.Generator, numbers: list[str], signs: list[str]) -> tuple[str, str]:
    """(text, its outermost sign) of a random tree over the numbers, with brackets only where they matter."""
    if not signs:
        return numbers[0], ""
    at = int(rng.integers(len(signs)))
    left, left_sign = _shape(rng, numbers[: at + 1], signs[:at])
    right, right_sign = _shape(rng, numbers[at + 1 :], signs[at + 1 :])
    sign = signs[at]
    strong = sign in "*/"
    if strong and left_sign and left_sign in "+-":
        left = f"({left})"
    if (
        right_sign
        and (strong or right_sign in "+-")
        and (sign, right_sign) not in (("+", "+"), ("+", "-"), ("*", "*"))
    ):
        right = f"({right})"
    return left + sign + right, sign
