"""Sources by number: deterministic, one split, levels, finite ones once an epoch; and the curriculum's arithmetic."""

import math
import pickle
import re

import pytest

from attnlab.data.problems import FAMILIES, curriculum, open_problems, split_of


def questions(source, numbers=range(60), **where):
    return [source.problem(number, **where).question for number in numbers]


@pytest.mark.smoke
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_arguments_give_equal_problems_of_one_split(name):
    spec = f"problems:{name}"
    train, test = open_problems(spec, "train"), open_problems(spec, "test")
    assert train.finite is None and train.num_levels == FAMILIES[name].num_levels
    assert train.scores == FAMILIES[name].scores
    first = [train.problem(number) for number in range(60)]
    again = [open_problems(spec, "train").problem(number) for number in reversed(range(60))]
    assert first == again[::-1] == [pickle.loads(pickle.dumps(train)).problem(n) for n in range(60)]
    assert {split_of(problem.identity) for problem in first} == {"train"}
    assert {split_of(test.problem(number).identity) for number in range(20)} == {"test"}
    assert {problem.level for problem in first} == {FAMILIES[name].usual_level}


def test_seed_stream_level_and_split_each_give_other_problems():
    def drawn(split="train", **options):
        level = options.pop("level", 6)
        return set(questions(open_problems("problems:copy", split, **options), level=level))

    plain = drawn()
    others = [drawn(seed=1), drawn(stream=1), drawn(level=7), drawn("test")]
    assert all(not plain & other for other in others) and plain == drawn()
    assert len(plain) == 60


def test_the_level_of_the_spec_is_the_sources_own():
    source = open_problems("problems:sort(noise=0.5, level=4)", "train")
    assert {source.problem(n).level for n in range(9)} == {4}
    assert {source.problem(n, level=9).level for n in range(9)} == {9}
    assert source.problem(5) == source.problem(5, level=4) == source.at(5)
    with pytest.raises(ValueError, match=r"problems:sort has no level 65: its levels are 1\.\.64"):
        source.problem(0, level=65)
    with pytest.raises(ValueError, match="has no level -1"):
        source.at(0, level=-1)


def test_some_problems_are_easier():
    source = open_problems("problems:copy", "train")
    levels = [source.problem(n, level=8, easier=0.25).level for n in range(600)]
    assert set(levels) == set(range(1, 9)) and 0.19 < sum(level < 8 for level in levels) / 600 < 0.31
    assert levels == [source.problem(n, level=8, easier=0.25).level for n in range(600)]
    same = [n for n in range(600) if levels[n] == 8]
    assert all(source.problem(n, 8, 0.25) == source.problem(n, 8) for n in same[:50])
    assert {source.problem(n, level=1, easier=1.0).level for n in range(20)} == {1}


def test_a_size_makes_so_many_problems_in_another_order_each_time():
    source = open_problems("problems:add(size=13)", "train", seed=3)
    assert source.finite == 13
    epochs = [questions(source, range(13 * epoch, 13 * epoch + 13)) for epoch in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]) and epochs[0] != epochs[1] != epochs[2]
    assert sorted(source.at(i).question for i in range(13)) == sorted(epochs[0])


def test_a_split_with_too_few_problems_is_a_sentence():
    with pytest.raises(
        ValueError, match=r"problems:dyck has hardly a problem of level 1 in split 'test' \(1000"
    ):
        open_problems("problems:dyck", "test").problem(0, level=1)


@pytest.mark.parametrize(
    ("spec", "split", "sentence"),
    [
        ("countdown", "train", "Problems 'countdown' must be 'problems:NAME', 'jsonl:FILE'"),
        ("problems:", "train", "must be 'problems:NAME'"),
        ("problems:sort", "validation", "have no split 'validation': they have train and test"),
        ("problems:sort(level=0)", "train", "level=0 of sort must lie in 1..64"),
        ("problems:sort(size=0)", "train", "size=0 of sort must lie in 1.."),
        ("problems:srot", "train", "did you mean 'sort'?"),
    ],
)
def test_bad_sources_are_sentences(spec, split, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        open_problems(spec, split)
    with pytest.raises(ValueError, match="seed=-1 must lie in"):
        open_problems("problems:sort", "train", seed=-1)


@pytest.mark.parametrize("leader", [True, False])
def test_the_barrier_is_met_once_whatever_happens(leader):
    met = []
    for spec in ("problems:sort", "problems:srot", "jsonl:nowhere"):
        try:
            open_problems(spec, "train", leader=leader, barrier=lambda: met.append(1))
        except ValueError:
            continue
    assert len(met) == 3


def test_the_curriculum_goes_up_and_down_within_its_levels():
    options = {"num_levels": 3, "decay": 0.9, "up": 0.8, "down": 0.2}
    level, mean = 1, curriculum.start(0.8, 0.2)
    assert mean == 0.5
    assert curriculum.advance(1, 0.5, 1.0, **options) == (1, pytest.approx(0.55))
    levels = []
    for _ in range(40):  # 0.5, then 1 - 0.5 * 0.9^n > 0.8 at n = 9
        level, mean = curriculum.advance(level, mean, 1.0, **options)
        levels.append(level)
    assert levels == [1] * 8 + [2] * 9 + [3] * 23 and mean > 0.8
    level, mean = 3, 0.5
    for _ in range(40):
        level, mean = curriculum.advance(level, mean, 0.0, **options)
    assert level == 1 and mean < 0.2
    assert curriculum.advance(2, 0.79, 0.9, **options) == (3, 0.5)
    assert curriculum.advance(2, 0.7, math.nan, **options) == (2, 0.7)
