"""What a verifiable problem is, and what a family of them can do: draw one, and score any text as its answer.

    problem = sample(rng, level)          question, a correct completion, and the answer that is checked
    scores  = score(text, problem)        {"exact": 0 or 1, ..}, each in [0, 1]; never raises, runs nothing

A problem is in the test split if a hash of its `identity` says so, in the training split otherwise: a tenth, whatever
the seed. The hash mixes; a linear one would make one residue of the sums the test.
"""

import dataclasses
import hashlib
from typing import Any, ClassVar

import numpy as np

SPLITS = ("train", "test")
SPACE = " \t\r\n"  # what may stand around an answer
LONGEST = 4096  # longer answers of families are wrong unread, so that no text takes long to score


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem; everything in it can be pickled."""

    question: str
    answer: Any  # what scoring compares with
    solution: str  # one completion, for supervised warm starts; right unless its family was asked for noise
    identity: str  # equal for problems that are the same but for their wording
    level: int
    meta: dict  # "family" names who scores it


@dataclasses.dataclass(frozen=True)
class Family:
    """Base of all families; a subclass's fields are its options, and scoring depends on none of them."""

    name: ClassVar[str]
    scores: ClassVar[tuple[str, ...]] = ("exact",)
    num_levels: ClassVar[int]
    usual_level: ClassVar[int]  # where nobody asks for another

    def __post_init__(self):
        self.validate()

    def validate(self) -> None:
        """ValueError for options that the family cannot have."""

    def sample(self, rng: np.random.Generator, level: int) -> Problem:
        """A random problem of a level 1..num_levels; equal generators give equal problems."""
        raise NotImplementedError

    @staticmethod
    def score(text: str, problem: Problem) -> dict[str, float]:
        """The `scores` of a completion."""
        raise NotImplementedError

    def need(self, condition: bool, sentence: str) -> None:
        """ValueError with the family's name and the sentence unless the condition holds."""
        if not condition:
            raise ValueError(f"problems:{self.name}: {sentence}")

    def problem(self, question: str, answer: Any, level: int, *, solution="", identity="", **meta) -> Problem:
        """A Problem of this family; solution and identity are answer and question unless given."""
        identity = f"{self.name} {identity or question}"
        return Problem(question, answer, solution or answer, identity, level, {"family": self.name} | meta)


def split_of(identity: str) -> str:
    """ "test" for a tenth of all identities, "train" for the others."""
    digest = hashlib.blake2b(identity.encode("utf-8", errors="surrogatepass"), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % 10 == 0 else "train"


def text_scores(text: str, answer: str, fraction: str) -> dict[str, float]:
    """`exact`, and under the name `fraction` the share of places that hold the right character, of the longer text."""
    text = text.strip(SPACE)
    if not text or len(text) > LONGEST:
        return {"exact": 0.0, fraction: 0.0}
    right = sum(a == b for a, b in zip(text, answer, strict=False))
    return {"exact": float(text == answer), fraction: right / max(len(text), len(answer))}
