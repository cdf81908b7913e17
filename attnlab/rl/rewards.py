"""Rewards: named functions of completions with weights, r = sum of weight_k * reward_k, each logged by its name.

    rewards = parse_rewards("exact + 0.1*well_formed - 0.5*repetition + my.module:function")
    values, errors = score_all(rewards, problems, texts, ids, lengths, truncated, max_new_tokens=64, overlong_cache=16)

    exact, well_formed, ..  the scores of the problems' families; 0 for truncated completions
    accuracy                the answer equals the listed one (attnlab.data.problems.answers); 0 for truncated ones
    math_verify             the same by the library math_verify, which must be installed
    format                  1 for <think>..</think><answer>..</answer> and nothing else
    length_penalty          0 up to L_max - L_c tokens, from there falling to -1 at L_max (soft overlong punishment)
    repetition              1 - distinct / all n-grams of 3 tokens; give it a negative weight
    MODULE:FUNCTION         called with prompts, texts, ids, answers, metas and truncated by keyword, lists with an
                            entry a row; it returns such a list of numbers, or None where it does not apply

Letters: K rewards; a row is one completion. NaN: the reward does not apply to the row.
"""

import importlib
import importlib.util
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from attnlab.data.problems import SCORES, Problem
from attnlab.data.specs import known
from attnlab.rl.config import RLWarning
from attnlab.rl.reward_functions import BUILT_IN, Rows, family_score

_WEIGHT = r"(?P<weight>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
_NAME = r"(?P<name>[A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?)"
_TERM = re.compile(rf"\s*(?P<sign>[+-]?)\s*(?:{_WEIGHT}\s*\*\s*)?{_NAME}\s*", re.ASCII)
_warned: set[str] = set()  # hooks whose failure has been told


class Reward(NamedTuple):
    """function: Rows -> one float a row, or None where the reward does not apply."""

    name: str
    weight: float
    function: Callable[[Rows], Sequence[float | None]]


def parse_rewards(text: str) -> tuple[Reward, ...]:
    """The rewards of a sum such as "exact + 0.1*well_formed - repetition"; hooks are imported here.

    A weight of 0 logs a reward without learning from it. ValueError in one sentence for a text that is no such sum, an
    unknown or repeated name, and a hook that cannot be imported.
    """
    rewards, place = [], 0
    while place < len(text) or not rewards:
        term = _TERM.match(text, place)
        if term is None or (rewards and not term["sign"]) or float(term["weight"] or 1) == math.inf:
            raise ValueError(
                f"rewards {text!r} are not understood from {text[place:]!r} on; "
                "write a sum like 'exact + 0.1*well_formed'"
            )
        weight = float(term["weight"] or 1) * (-1 if term["sign"] == "-" else 1)
        if term["name"] in [reward.name for reward in rewards]:
            raise ValueError(f"rewards {text!r} name {term['name']!r} twice; add up its weights")
        rewards.append(Reward(term["name"], weight, _find(term["name"])))
        place = term.end()
    return tuple(rewards)


def check_rewards(rewards: Sequence[Reward], scores: Sequence[str], overlong_cache: int) -> None:
    """ValueError for rewards that could apply to no problem with these scores, or that lack their option."""
    for name in (reward.name for reward in rewards):
        if name in SCORES and name not in scores:
            raise ValueError(f"reward {name!r} is no score of these problems; they have {', '.join(scores)}")
        if name == "length_penalty" and not overlong_cache:
            raise ValueError(
                "reward 'length_penalty' needs grpo.overlong_cache above 0, the tokens it falls over"
            )


def score_all(
    rewards: Sequence[Reward],
    problems: Sequence[Problem],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    lengths: Sequence[int],
    truncated: Sequence[bool],
    max_new_tokens: int,
    overlong_cache: int = 0,
    prompts: Sequence[str] | None = None,
) -> tuple[np.ndarray, dict[str, int]]:
    """(float32 [rows, K] with NaN where a reward does not apply, how often each reward failed).

    problems, texts, ids, lengths, truncated: an entry a row each; see Rows. prompts: the questions if None.
    A function that raises, or does not return one number a row, gives NaN in all rows: it is counted, and told of in an
    RLWarning once. ValueError if the lists differ in length.
    """
    prompts = [problem.question for problem in problems] if prompts is None else prompts
    rows = Rows(problems, prompts, texts, ids, lengths, truncated, int(max_new_tokens), int(overlong_cache))
    sizes = {name: len(value) for name, value in rows._asdict().items() if not isinstance(value, int)}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"completions have lists of different lengths {sizes}; give one entry a row in each")
    values, errors = np.full((len(texts), len(rewards)), np.nan, np.float32), {}
    for k, reward in enumerate(rewards):
        try:
            values[:, k] = _numbers(reward.function(rows), len(texts))
        except Exception as error:  # a user's function may raise anything, and the run goes on
            errors[reward.name] = 1
            _warn(reward.name, error)
    return values, errors


def _numbers(values: Any, rows: int) -> list[float]:
    values = [math.nan if value is None else float(value) for value in values]
    if len(values) != rows:
        raise ValueError(f"it returned {len(values)} values for {rows} rows")
    if any(math.isinf(value) for value in values):
        raise ValueError("it returned an infinite value")
    return values


def _warn(name: str, error: Exception) -> None:
    if name not in _warned:
        _warned.add(name)
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"reward {name!r} failed ({type(error).__name__}: {reason}): its batch counts as not scored by it; "
            "later failures are only counted",
            RLWarning,
            stacklevel=3,
        )


def _find(name: str) -> Callable[[Rows], Sequence[float | None]]:
    if ":" in name:
        return _hook(name)
    if name in SCORES:
        return family_score(name)
    known(name, (*BUILT_IN, *SCORES), "reward")
    if name == "math_verify" and importlib.util.find_spec("math_verify") is None:
        raise ValueError("reward 'math_verify' needs its library: pip install math-verify, or use 'accuracy'")
    return BUILT_IN[name]


def _hook(name: str) -> Callable[[Rows], Sequence[float | None]]:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        raise ValueError(
            f"reward {name!r} cannot be imported ({type(error).__name__}: {error}); check the module's path"
        ) from error
    function = getattr(module, known(function_name, vars(module), f"function of {module_name}"))
    if not callable(function):
        raise ValueError(f"reward {name!r} is a {type(function).__name__}, not a function")

    def call(rows: Rows) -> Sequence[float | None]:
        return function(
            prompts=list(rows.prompts),
            texts=list(rows.texts),
            ids=[list(map(int, row)) for row in rows.ids],
            answers=[problem.answer for problem in rows.problems],
            metas=[problem.meta for problem in rows.problems],
            truncated=[bool(cut) for cut in rows.truncated],
        )

    return call
