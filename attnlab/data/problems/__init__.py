"""Problems whose answers can be checked, by name: generated ones with levels, and lists of questions and answers.

    source = open_problems("problems:countdown", "train", seed=0)
    problem = source.problem(17, level=3)         its question is the prompt, or goes into one
    scores = score("3*5+7", problem)              {"exact": 1.0, "well_formed": 1.0}

Families: add, chain, sort, copy, reverse, countdown, dyck. Lists: jsonl:FILE, tfds:NAME, hf:REPO:SPLIT (see lists.py).
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from attnlab.data.config import MAX_SEED, data_directory
from attnlab.data.prepared import leader_first
from attnlab.data.problems.countdown import Countdown
from attnlab.data.problems.digits import Add, Chain, Copy, Reverse, Sort
from attnlab.data.problems.dyck import Dyck
from attnlab.data.problems.lists import KINDS, Listed
from attnlab.data.problems.problem import SPLITS, Family, Problem, split_of
from attnlab.data.problems.source import GeneratedProblems, ListedProblems, ProblemSource
from attnlab.data.specs import known, read_spec

FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (Add, Chain, Sort, Copy, Reverse, Countdown, Dyck)
}
SCORERS = FAMILIES | {Listed.name: Listed}
SOURCE_OPTIONS = {"level": int, "size": int}  # what every family's spec may have besides the family's options
SCORES = tuple(dict.fromkeys(name for family in SCORERS.values() for name in family.scores))


def open_problems(
    spec: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    *,
    seed: int = 0,
    stream: int = 0,
    leader: bool = True,
    barrier: Callable[[], None] | None = None,
) -> ProblemSource:
    """One split of the problems that a spec names; equal arguments give equal problems, on every machine.

    spec: "problems:NAME", or "problems:NAME(OPTION=VALUE, ..)" with the family's options and with `level`, the source's
        own (else the family's usual one), and `size`, for so many problems of each level rather than endless ones; or
        "jsonl:FILE", "tfds:NAME" or "hf:REPO:SPLIT" with options after "?" (see lists.py).
    split: "train" or "test"; TFDS datasets have splits of their own.
    data_dir, leader, barrier: of TFDS datasets, see open_source.
    seed, stream: of generated problems; other streams of a seed are other problems, of the same split.
    Raises ValueError in one sentence for a bad spec, a split without problems, and data that cannot be had.
    """
    kind, _, name = spec.partition(":")
    with leader_first(leader, barrier):
        if kind not in ("problems", *KINDS) or not name:
            raise ValueError(
                f"Problems {spec!r} must be 'problems:NAME', 'jsonl:FILE', 'tfds:NAME' or 'hf:REPO:SPLIT'; "
                f"families are {', '.join(FAMILIES)}."
            )
        if kind != "tfds" and split not in SPLITS:
            raise ValueError(f"Problems {spec!r} have no split {split!r}: they have {' and '.join(SPLITS)}.")
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed={seed} must lie in 0..{MAX_SEED}.")
        if kind == "problems":
            return _generated(name, split, seed, stream)
        problems = KINDS[kind](name, split, Path(data_directory(data_dir)))
    if not problems:
        raise ValueError(f"Problems {spec!r} have none in split {split!r}: add rows, or name another split.")
    return ListedProblems(problems, seed=seed, where=spec)


def find_family(text: str) -> tuple[Family, dict[str, int]]:
    """The family written as "sort" or "sort(noise=0.5, level=6)", and the options that are not its own: level, size."""
    name, options = read_spec(text, "problems", "'problems:sort' or 'problems:sort(level=6)'")
    cls = FAMILIES[known(name, FAMILIES, "family of problems")]
    types = {field.name: type(field.default) for field in dataclasses.fields(cls)}
    for option, value in options.items():
        wanted = (types | SOURCE_OPTIONS)[known(option, types | SOURCE_OPTIONS, f"option of {name}")]
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(
                f"option {option}={value!r} of problems:{name} must be of type {wanted.__name__}."
            )
    rest = {option: options.pop(option) for option in SOURCE_OPTIONS if option in options}
    return cls(**options), rest


def score(text: str, problem: Problem) -> dict[str, float]:
    """The scores of a completion, by the family that made the problem; "exact" is always among them. Never raises."""
    return SCORERS[problem.meta["family"]].score(text, problem)


def _generated(text: str, split: str, seed: int, stream: int) -> GeneratedProblems:
    family, options = find_family(text)
    level, size = options.get("level", family.usual_level), options.get("size")
    if not 1 <= level <= family.num_levels:
        raise ValueError(f"level={level} of {family.name} must lie in 1..{family.num_levels}.")
    if size is not None and not 1 <= size < 2**31:
        raise ValueError(f"size={size} of {family.name} must lie in 1..{2**31 - 1}; leave it out for no end.")
    where = f"problems:{family.name}"
    return GeneratedProblems(family, split, level=level, size=size, seed=seed, stream=stream, where=where)


__all__ = [
    "FAMILIES",
    "SCORES",
    "Family",
    "Problem",
    "ProblemSource",
    "find_family",
    "open_problems",
    "score",
    "split_of",
]
