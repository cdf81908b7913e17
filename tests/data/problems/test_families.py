"""Families: every solution is right at every level, nothing else is, and the two splits share no problem."""

import itertools
import pickle
import re

import numpy as np
import pytest

from attnlab.data.problems import FAMILIES, SCORES, Problem, find_family, score, split_of
from attnlab.data.problems.expressions import parse, random_expression

HOSTILE = [
    "",
    " ",
    "=",
    "\0",
    "\ud800",
    "９９",  # full-width digits, which int() would read
    "٣*٥+٧",  # Arabic-Indic digits, as the rest of these three
    "²",
    "1e999999999",
    "9**9**9**9**9",
    "9" * 10_000,
    "1+" * 5_000 + "1",
    "(" * 5_000 + "1" + ")" * 5_000,
    "(" * 100_000,
    "-" * 300 + "3",
    "__import__('os').system('true')",
    "3*5+7+0",
    "0*1",
    "3/0",
    "3 5",
    "(3*5+7",
    "3*5+7)",
    "()",
    "3*5+7=22",
    "3*5+7;",
    "+3*5+7",
    "3*-5+7",
    "３*5+7",
    "3*5+7\u00a0",
    "True",
    "nan",
    "inf",
]


def draw(name, level, count=50, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [FAMILIES[name](**options).sample(rng, level) for _ in range(count)]


def value_by_python(question):
    """The right answer, by Python's own arithmetic."""
    return eval(question.removesuffix("="), {"__builtins__": {}})  # text of our own making


@pytest.mark.smoke
@pytest.mark.parametrize("name", FAMILIES)
def test_every_solution_is_right_at_every_level(name):
    family = FAMILIES[name]
    assert family.name == name and 1 <= family.usual_level <= family.num_levels
    levels = {*range(1, min(family.num_levels, 9) + 1), family.num_levels}
    for level in levels:
        for problem in draw(name, level, 12):
            assert problem.level == level and problem.question.endswith("=")
            found = score(problem.solution, problem)
            assert tuple(found) == family.scores and set(found.values()) == {1.0}, problem
            assert score(f" {problem.solution}\n", problem)["exact"] == 1
            assert pickle.loads(pickle.dumps(problem)) == problem
    assert set(family.scores) <= set(SCORES)


def test_answers_are_those_of_other_solvers():
    for problem in draw("add", 3, 200):
        assert int(problem.answer) == value_by_python(problem.question)
    for problem in draw("add", 3, 50, reverse=True):
        assert int(problem.answer[::-1]) == value_by_python(problem.question)
    for level in (1, 4, 9):
        for problem in draw("chain", level, 100, modulus=13):
            assert int(problem.answer) == value_by_python(problem.question)
            assert len(re.findall(r"[-+*]", problem.question)) == level
    for problem in draw("sort", 6):
        digits = problem.question[:-1]
        assert len(digits) == 6 and problem.answer == min(map("".join, itertools.permutations(digits)))
    for problem in draw("copy", 7) + draw("reverse", 7):
        backwards = problem.meta["family"] == "reverse"
        assert problem.answer == (problem.question[-2::-1] if backwards else problem.question[:-1])
    for problem in draw("dyck", 5, closed=3):
        text = problem.question[:-1] + problem.answer
        assert len(problem.answer) == 5 and len(text) == 16
        while any(pair in text for pair in ("()", "[]", "{}", "<>")):
            text = re.sub(r"\(\)|\[\]|\{\}|<>", "", text)
        assert not text


def test_chain_has_brackets_only_where_they_matter():
    questions = [problem.question for problem in draw("chain", 2, 200)]
    assert any(re.fullmatch(r"\(\(\d[-+]\d\)\*\d\)%11=", question) for question in questions)
    assert any(re.fullmatch(r"\(\d\*\d\*\d\)%11=", question) for question in questions)
    assert all(re.fullmatch(r"\((\d[*]\d|\(\d[-+]\d\)|\d[-+]\d)[-+*]\d\)%11=", q) for q in questions)


@pytest.mark.parametrize("brackets", [False, True])
def test_countdown_accepts_what_exhaustive_search_finds_and_nothing_else(brackets):
    for problem in draw("countdown", 3, 25, brackets=brackets):
        digits, target = problem.question[:-1].split(":")
        assert re.fullmatch(r"[1-9]{3}", digits) and 0 <= int(target) <= 99
        right = 0
        for (a, b, c), s, t in itertools.product(itertools.permutations(digits), "+-*/", "+-*/"):
            for text in (f"{a}{s}{b}{t}{c}", f"({a}{s}{b}){t}{c}", f"{a}{s}({b}{t}{c})"):
                want = float(exact_value(text) == int(target))
                assert score(text, problem) == {"exact": want, "well_formed": 1.0}, (text, problem.question)
                right += want
        assert right and ("(" not in problem.solution or brackets)
    assert any("(" in problem.solution for problem in draw("countdown", 3, 50, brackets=True))


def exact_value(text):
    """By Python, with division that must leave nothing: every quotient is checked where it stands."""

    class Exact(int):
        def __truediv__(self, other):
            if other == 0 or int(self) % int(other):
                raise ZeroDivisionError
            return Exact(int(self) // int(other))

        __add__ = lambda self, other: Exact(int(self) + int(other))  # noqa: E731
        __sub__ = lambda self, other: Exact(int(self) - int(other))  # noqa: E731
        __mul__ = lambda self, other: Exact(int(self) * int(other))  # noqa: E731

    try:
        return int(eval(re.sub(r"(\d+)", r"Exact(\1)", text), {"Exact": Exact}))
    except ZeroDivisionError:
        return None


def test_countdown_wants_every_digit_once():
    meta = {"family": "countdown", "digits": [3, 7, 5]}
    problem = Problem("375:22=", 22, "3*5+7", "", 3, meta)
    for text in ("3*5+7", "7+5*3", "(3*5)+7", "7 + (5*3)", " 3*5+7 "):
        assert score(text, problem) == {"exact": 1.0, "well_formed": 1.0}, text
    for text in ("3+5+7", "7-3*5", "5/3*7", "(7)*(3-5)"):
        assert score(text, problem) == {"exact": 0.0, "well_formed": 1.0}, text
    for text in ("22", "3*5+7+0", "3*5+7*1", "35-7", "15+7", "3*5", "3*5+7+5-5", "7*3+1", "03*5+07+0"):
        assert score(text, problem) == {"exact": 0.0, "well_formed": 0.0}, text


@pytest.mark.parametrize("name", FAMILIES)
def test_hostile_texts_score_nothing_and_raise_nothing(name):
    for problem in draw(name, min(3, FAMILIES[name].num_levels), 3):
        for text in HOSTILE:
            if text == problem.answer:
                continue
            assert score(text, problem)["exact"] == 0, (text[:40], problem)
        for text in ("", "x" * 10**6, problem.solution * 100_000):
            assert set(score(text, problem).values()) == {0.0}


@pytest.mark.parametrize("name", ["add", "sort", "copy", "reverse", "dyck"])
def test_fractions_count_places(name):
    problem = draw(name, 6, 1, seed=3)[0]
    answer, fraction = problem.answer, FAMILIES[name].scores[1]
    assert score(answer[:-1], problem) == {"exact": 0.0, fraction: pytest.approx(1 - 1 / len(answer))}
    assert score(answer + "x", problem) == {"exact": 0.0, fraction: len(answer) / (len(answer) + 1)}
    assert score("x" + answer[1:], problem)[fraction] == pytest.approx(1 - 1 / len(answer))
    assert score("x" * len(answer), problem)[fraction] == 0


def test_noisy_demonstrations_are_shuffled_and_scoring_stays_right():
    problems = draw("sort", 6, 400, noise=0.5)
    wrong = [problem for problem in problems if problem.solution != problem.answer]
    assert 0.4 < len(wrong) / 400 < 0.6
    for problem in wrong:
        assert sorted(problem.solution) == list(problem.answer)
        assert score(problem.answer, problem)["exact"] == 1 and score(problem.solution, problem)["exact"] == 0
    assert all(p.solution != p.answer for p in draw("reverse", 60, 20, noise=1))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tenth_of_all_problems_are_tests_and_commuted_ones_stay_together(name):
    level = {"add": 4, "chain": 6, "countdown": 5, "dyck": 20}.get(name, 8)
    identities = {problem.identity for problem in draw(name, level, 2000)}
    share = np.mean([split_of(identity) == "test" for identity in identities])
    assert len(identities) > 1500 and abs(share - 0.1) < 0.03
    same = {}
    for problem in draw("countdown", 3, 300) + draw("add", 1, 300):
        key = (
            tuple(sorted(re.findall(r"\d", problem.question))),
            str(problem.answer),
            problem.meta["family"],
        )
        if problem.meta["family"] == "countdown":
            key = (tuple(sorted(problem.question.split(":")[0])), *key[1:])
        assert same.setdefault(key, problem.identity) == problem.identity


def test_the_split_depends_on_no_residue():
    """Of sums with any last digit a tenth are tests: a linear hash would take all of one residue and no others."""
    for residue in range(10):
        pairs = [(a, b) for a in range(100) for b in range(a, 100) if (a + b) % 10 == residue]
        share = np.mean([split_of(f"add {a}+{b}") == "test" for a, b in pairs])
        assert 0.04 < share < 0.17


def test_what_is_no_expression_is_not_read():
    assert parse(" 3 * (5+7) / 4 \n") == ([3, 5, 7, 4], 9)
    assert parse("2-3-4").value == -5 and parse("8/4/2").value == 1 and parse("2+3*4").value == 14
    assert parse("3/2*4") == ([3, 2, 4], None) and parse("3/(5-5)") == ([3, 5, 5], None)
    malformed = [
        "(3*5+7",
        "3*5+7)",
        "3*(5+7",
        ")3(",
        "()",
        "3+",
        "*3",
        "3++5",
        "3(5)",
        "(3)5",
        "3 5",
        "3 5+7",
        "-3",
        "3.5",
    ]
    for text in (*malformed, "3\n+5", "3\t+5", "1234567", *HOSTILE[:10]):
        assert parse(text) is None, text


def test_random_expressions_use_all_numbers_and_need_their_brackets():
    rng = np.random.default_rng(0)
    for _ in range(300):
        numbers = rng.integers(1, 10, 5).tolist()
        text = random_expression(rng, numbers, True)
        found = parse(text)
        assert sorted(found.numbers) == sorted(numbers)
        assert found.value == exact_value(text)
    assert parse("1" * 7) is None and parse("(" * 32 + "1" + ")" * 32).value == 1
    assert parse("(" * 33 + "1" + ")" * 33) is None and parse("1" + " " * 300) is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sorted", "unknown family of problems 'sorted'; did you mean 'sort'?"),
        ("sort(nois=0.5)", "unknown option of sort 'nois'; did you mean 'noise'?"),
        ("sort(name='x')", "unknown option of sort 'name'"),
        ("sort(0.5)", "is not understood; write one like 'problems:sort'"),
        ("sort(noise=open('x'))", "is not understood"),
        ("sort(noise=1.5)", "problems:sort: noise=1.5 is no probability"),
        ("sort(noise='a')", "option noise='a' of problems:sort must be of type float"),
        ("sort(level=2.0)", "option level=2.0 of problems:sort must be of type int"),
        ("sort(level=True)", "option level=True of problems:sort must be of type int"),
        ("countdown(brackets=1)", "must be of type bool"),
        ("chain(modulus=1)", "problems:chain: modulus=1 must lie in 2..1000000"),
        ("dyck(kinds=5)", "problems:dyck: kinds=5 must lie in 1..4"),
        ("dyck(closed=-1)", "problems:dyck: closed=-1 must lie in 0..1000"),
    ],
)
def test_bad_specs_are_sentences(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        find_family(text)
    assert find_family("sort(noise=1, level=4)") == (FAMILIES["sort"](noise=1), {"level": 4})
