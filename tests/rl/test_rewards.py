"""Rewards: sums of names, what each function gives, truncation, and hooks that fail."""

import math
import re
import sys
import types
import warnings

import numpy as np
import pytest

from attnlab.data.problems import FAMILIES, SCORES, Problem, open_problems
from attnlab.rl import rewards as module
from attnlab.rl.config import RLWarning
from attnlab.rl.rewards import check_rewards, parse_rewards, score_all

COUNTDOWN = Problem("375:22=", 22, "3*5+7", "", 3, {"family": "countdown", "digits": [3, 7, 5]})
LISTED = Problem("Half of 1?", "\\frac{1}{2}", "0.5", "", 1, {"family": "listed", "row": 4})
SORT = Problem("312=", "123", "123", "", 3, {"family": "sort"})


def run(text, problems, texts, *, ids=None, lengths=None, truncated=None, longest=8, cache=4):
    ids = [list(range(len(t))) for t in texts] if ids is None else ids
    lengths = [len(row) for row in ids] if lengths is None else lengths
    truncated = [False] * len(texts) if truncated is None else truncated
    return score_all(parse_rewards(text), problems, texts, ids, lengths, truncated, longest, cache)


def column(text, problems, texts, **options):
    values, errors = run(text, problems, texts, **options)
    assert not errors and values.dtype == np.float32 and values.shape == (len(texts), 1)
    return [None if math.isnan(value) else round(float(value), 6) for value in values[:, 0]]


@pytest.fixture
def hooks(monkeypatch):
    """A module of hooks called my_rewards; failures told of before are forgotten."""
    hooks = types.ModuleType("my_rewards")
    hooks.seen = []

    def lengths(**rows):
        hooks.seen.append(rows)
        return [
            None if cut else float(len(text))
            for text, cut in zip(rows["texts"], rows["truncated"], strict=True)
        ]

    hooks.lengths = lengths
    hooks.raises = lambda **rows: 1 / 0
    hooks.short = lambda **rows: [1.0]
    hooks.words = lambda **rows: ["a"] * len(rows["texts"])
    hooks.infinite = lambda **rows: [math.inf] * len(rows["texts"])
    hooks.scalar = lambda **rows: 1.0
    hooks.number = 3
    monkeypatch.setitem(sys.modules, "my_rewards", hooks)
    monkeypatch.setattr(module, "_warned", set())
    return hooks


@pytest.mark.smoke
def test_sums_are_read():
    def read(text):
        return [(reward.name, reward.weight) for reward in parse_rewards(text)]

    assert read("exact") == [("exact", 1.0)]
    assert read("exact + 0.1*well_formed - 0.5*repetition") == [
        ("exact", 1.0), ("well_formed", 0.1), ("repetition", -0.5),
    ]  # fmt: skip
    assert read("  -1e-3 * format+ .5*accuracy") == [("format", -0.001), ("accuracy", 0.5)]
    assert read("2.*exact + 0*os.path:join") == [("exact", 2.0), ("os.path:join", 0.0)]
    for name in (*SCORES, "format", "accuracy", "length_penalty", "repetition"):
        assert read(name) == [(name, 1.0)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "rewards '' are not understood from '' on"),
        ("exact +", "are not understood from '+' on"),
        ("exact format", "are not understood from 'format' on"),
        ("exact * 2", "are not understood from '* 2' on"),
        ("exact - -format", "are not understood from '- -format' on"),
        ("1e999*exact", "are not understood"),
        ("..*exact", "are not understood"),
        ("２*exact", "are not understood"),
        ("exact + 2*exact", "name 'exact' twice; add up its weights"),
        ("exat", "unknown reward 'exat'; did you mean 'exact'?"),
        ("no.such:thing", "reward 'no.such:thing' cannot be imported (ModuleNotFoundError"),
        ("os.path:joi", "unknown function of os.path 'joi'; did you mean 'join'?"),
        ("my_rewards:number", "reward 'my_rewards:number' is a int, not a function"),
    ],
)
def test_other_texts_are_sentences(hooks, text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_rewards(text)


def test_rewards_that_cannot_apply_are_refused_beforehand():
    listed, countdown = ("exact",), FAMILIES["countdown"].scores
    check_rewards(parse_rewards("exact + well_formed + format"), countdown, 0)
    with pytest.raises(ValueError, match="'well_formed' is no score of these problems; they have exact"):
        check_rewards(parse_rewards("exact + well_formed"), listed, 0)
    with pytest.raises(ValueError, match="'length_penalty' needs grpo.overlong_cache above 0"):
        check_rewards(parse_rewards("length_penalty"), countdown, 0)
    check_rewards(parse_rewards("length_penalty"), countdown, 2)


def test_scores_of_families_by_name():
    problems = [COUNTDOWN, COUNTDOWN, SORT, LISTED, SORT]
    texts = ["3*5+7", "3+5+7", "132", "it is 0.5", ""]
    assert column("exact", problems, texts) == [1, 0, 0, 1, 0]
    assert column("well_formed", problems, texts) == [1, 1, None, None, None]
    assert column("position_fraction", problems, texts) == [None, None, round(1 / 3, 6), None, 0]
    assert column("accuracy", problems, texts) == [None, None, None, 1, None]
    values, _ = run("exact - well_formed + accuracy", problems, texts)
    np.testing.assert_array_equal(values[3], np.float32([1, np.nan, 1]))  # weights are not applied here


@pytest.mark.parametrize("name", FAMILIES)
def test_truncated_completions_have_answered_nothing(name):
    source = open_problems(f"problems:{name}", "train")
    problems = [source.problem(n) for n in range(6)]
    texts, cut = [problem.solution for problem in problems], [False, True] * 3
    for score in FAMILIES[name].scores:
        assert column(score, problems, texts, truncated=cut) == [1, 0] * 3
    assert column("accuracy", [LISTED] * 2, ["0.5"] * 2, truncated=[False, True]) == [1, 0]
    assert column("repetition", [SORT], ["1111"], ids=[[1, 1, 1, 1]], truncated=[True]) == [0.5]


def test_format_wants_one_thought_and_one_answer():
    good = ["<think>a\nb</think><answer>1</answer>", " <think></think>\n\n<answer></answer>\n"]
    bad = [
        "",
        "<answer>1</answer>",
        "<answer>1</answer><think>a</think>",
        "<think>a</think>so<answer>1</answer>",
        "<think>a</think><answer>1</answer>.",
        "<think>a</think><think>b</think><answer>1</answer>",
        "<think>a<answer>0</answer></think><answer>1</answer>",
        "<think>a</think><answer>1",
        "<THINK>a</THINK><ANSWER>1</ANSWER>",
    ]
    assert column("format", [SORT] * 11, good + bad) == [1] * 2 + [0] * 9


def test_length_penalty_counts_tokens():
    texts, lengths = ["x" * 100] * 9, range(9)
    want = [0, 0, 0, 0, 0, -0.25, -0.5, -0.75, -1]
    assert column("length_penalty", [SORT] * 9, texts, lengths=lengths, ids=[[]] * 9) == want
    assert column("length_penalty", [SORT], [""], lengths=[9], ids=[[]]) == [-1]
    with pytest.warns(RLWarning, match="'length_penalty' failed .* cache=0 must be positive"):
        assert run("length_penalty", [SORT], [""], cache=0)[1] == {"length_penalty": 1}


def test_repetition_is_the_share_of_trigrams_seen_before():
    rows = [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5], [1, 1, 1, 1, 1], [1, 2, 1, 2, 1, 2]]
    assert column("repetition", [SORT] * 7, [""] * 7, ids=rows) == [0, 0, 0, 0, 0, round(2 / 3, 6), 0.5]
    arrays = [np.asarray(row, np.int32) for row in rows]
    assert column("repetition", [SORT] * 7, [""] * 7, ids=arrays) == column(
        "repetition", [SORT] * 7, [""] * 7, ids=rows
    )


def test_hooks_see_everything_by_keyword(hooks):
    values, errors = run(
        "my_rewards:lengths",
        [LISTED, SORT],
        ["ab", ""],
        ids=[np.arange(2), []],
        truncated=np.array([False, True]),
    )
    assert not errors and values[0, 0] == 2 and np.isnan(values[1, 0])
    assert hooks.seen == [
        {
            "prompts": ["Half of 1?", "312="],
            "texts": ["ab", ""],
            "ids": [[0, 1], []],
            "answers": ["\\frac{1}{2}", "123"],
            "metas": [{"family": "listed", "row": 4}, {"family": "sort"}],
            "truncated": [False, True],
        }
    ]
    score_all(
        parse_rewards("my_rewards:lengths"), [SORT], ["a"], [[1]], [1], [False], 8, prompts=["Sort 312="]
    )
    assert hooks.seen[1]["prompts"] == ["Sort 312="]


@pytest.mark.parametrize("name", ["raises", "short", "words", "infinite", "scalar"])
def test_a_hook_that_fails_is_counted_and_told_of_once(hooks, name):
    text = f"exact + my_rewards:{name}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            values, errors = run(text, [SORT, SORT], ["123", "321"])
            assert errors == {f"my_rewards:{name}": 1}
            np.testing.assert_array_equal(values, np.float32([[1, np.nan], [0, np.nan]]))
    told = [str(warning.message) for warning in caught if warning.category is RLWarning]
    assert len(told) == 1 and f"reward 'my_rewards:{name}' failed (" in told[0]
    assert {
        "raises": "ZeroDivisionError",
        "short": "1 values for 2 rows",
        "infinite": "an infinite value",
    }.get(name, "Error") in told[0]


def test_lists_of_different_lengths_are_a_sentence():
    with pytest.raises(ValueError, match="'texts': 2, 'ids': 1"):
        run("exact", [SORT, SORT], ["a", "b"], ids=[[1]])
    values, errors = run("exact + format", [], [])
    assert values.shape == (0, 2) and not errors


def test_math_verify_is_used_only_if_it_is_there(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'math_verify' needs its library: pip install math-verify"):
        parse_rewards("math_verify")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    library = types.SimpleNamespace(
        parse=lambda text, parsing_timeout: text.strip("$"), verify=lambda a, b, timeout_seconds: a == b
    )
    monkeypatch.setitem(sys.modules, "math_verify", library)
    texts = ["\\frac{1}{2}", "0.5", "\\frac{1}{2}"]
    assert column("math_verify", [LISTED, LISTED, SORT], texts) == [1, 0, None]
