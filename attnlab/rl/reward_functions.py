"""The rewards that have a name: what they give each completion. `rewards` weighs them and keeps users' own beside them.

Every function takes Rows and returns one float a row, or None where it does not apply to the row.
"""

import re
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from attnlab.data.problems import Problem, score
from attnlab.data.problems.answers import correct
from attnlab.rl.completions import overlong_penalty

NGRAM = 3
MATH_SECONDS = 5
_FORMAT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


class Rows(NamedTuple):
    """What rewards see of completions, a list with an entry a row each, and the limits of the rollout."""

    problems: Sequence[Problem]
    prompts: Sequence[str]
    texts: Sequence[str]  # decoded, without EOS and padding
    ids: Sequence[Sequence[int]]  # tokens, without padding
    lengths: Sequence[int]  # tokens, EOS included
    truncated: Sequence[bool]  # no EOS within max_new_tokens
    max_new_tokens: int  # L_max
    overlong_cache: int  # L_c


def family_score(name: str) -> Callable[[Rows], list[float | None]]:
    """The function of one score of the problems' families."""

    def function(rows: Rows) -> list[float | None]:
        values = [
            score(text, problem).get(name) for text, problem in zip(rows.texts, rows.problems, strict=True)
        ]
        return _finished(values, rows)

    return function


def _finished(values: list[float | None], rows: Rows) -> list[float | None]:
    """Truncated completions have not given an answer, whatever they look like."""
    return [
        0.0 if cut and value is not None else value for value, cut in zip(values, rows.truncated, strict=True)
    ]


def _judged(rows: Rows, judge: Callable[[str, str], bool]) -> list[float | None]:
    """A judge of (text, answer) where the problem's answer is a text of a list."""
    values = [
        float(judge(text, problem.answer)) if problem.meta["family"] == "listed" else None
        for text, problem in zip(rows.texts, rows.problems, strict=True)
    ]
    return _finished(values, rows)


def accuracy(rows: Rows) -> list[float | None]:
    """1 if the answers are equal; does not apply to generated problems, whose answers are not texts to find."""
    return _judged(rows, correct)


def math_verify(rows: Rows) -> list[float | None]:
    """1 if the library math_verify finds the answers equal, within its seconds for each."""
    import math_verify as library

    # Its limits on time are alarms, which only the main thread can set.
    seconds = MATH_SECONDS if threading.current_thread() is threading.main_thread() else None

    def judge(text: str, answer: str) -> bool:
        wanted = library.parse(f"${answer}$", parsing_timeout=seconds)
        found = library.parse(text, parsing_timeout=seconds)
        return library.verify(wanted, found, timeout_seconds=seconds)

    return _judged(rows, judge)


def format_reward(rows: Rows) -> list[float]:
    """1 for one thought and one answer, in this order, and nothing around them."""

    def right(text: str) -> bool:
        tags = ("<think>", "</think>", "<answer>", "</answer>")
        return all(text.count(tag) == 1 for tag in tags) and _FORMAT.fullmatch(text) is not None

    return [float(right(text)) for text in rows.texts]


def length_penalty(rows: Rows) -> list[float]:
    """The soft overlong punishment of the completion's tokens, between 0 and -1."""
    return overlong_penalty(np.asarray(rows.lengths), rows.max_new_tokens, rows.overlong_cache).tolist()


def repetition(rows: Rows) -> list[float]:
    """1 - distinct / all n-grams of tokens; 0 for completions shorter than one."""

    def share(row: Sequence[int]) -> float:
        grams = list(zip(*(row[i:] for i in range(NGRAM)), strict=False))
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    return [share([int(token) for token in row]) for row in rows.ids]


BUILT_IN: dict[str, Callable[[Rows], Sequence[float | None]]] = {
    "accuracy": accuracy,
    "math_verify": math_verify,
    "format": format_reward,
    "length_penalty": length_penalty,
    "repetition": repetition,
}
