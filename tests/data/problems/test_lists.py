"""Lists of questions and answers: a file of 20 rows, a TFDS dataset and a stand-in for the hub's library."""

import json
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from attnlab.data.problems import open_problems, score, split_of

TWENTY = Path(__file__).parent / "twenty.jsonl"
ROWS = [json.loads(line) for line in TWENTY.read_text(encoding="utf-8").splitlines()]
SUMS = [
    (f"What is {i} + {i + 1}?", f"{i} + {i + 1} = {2 * i + 1}\n#### 1,{2 * i + 1:03d}") for i in range(30)
]


class TinySums(tfds.core.GeneratorBasedBuilder):
    """Questions and answers as GSM8K has them."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        features = {
            "question": tfds.features.Text(),
            "answer": tfds.features.Text(),
            "hint": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(SUMS[:20]), "test": self._generate_examples(SUMS[20:])}

    def _generate_examples(self, rows):
        for i, (question, answer) in enumerate(rows):
            yield i, {"question": question, "answer": answer, "hint": "#### 7"}


def everything(source):
    return [source.at(i) for i in range(source.finite)]


@pytest.fixture
def write(tmp_path):
    def file(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
        return f"jsonl:{path}"

    return file


@pytest.mark.smoke
def test_a_file_is_divided_by_the_hash_of_its_questions():
    train, test = (open_problems(f"jsonl:{TWENTY}", split) for split in ("train", "test"))
    problems = {split: everything(source) for split, source in (("train", train), ("test", test))}
    assert train.finite + test.finite == 20 and test.finite >= 1
    assert {p.question for p in sum(problems.values(), [])} == {row["prompt"] for row in ROWS}
    assert all(split_of(p.identity) == split for split in problems for p in problems[split])
    assert train.scores == ("exact",) and train.num_levels == 3
    for problem in sum(problems.values(), []):
        assert score(problem.solution, problem) == {"exact": 1.0}, problem
        assert score(f"<answer>{problem.answer}</answer>", problem) == {"exact": 1.0}
        assert score("", problem) == score("no idea", problem) == {"exact": 0.0}


def test_the_answer_is_what_a_solution_ends_in():
    rows = {
        p.question: p
        for split in ("train", "test")
        for p in everything(open_problems(f"jsonl:{TWENTY}", split))
    }
    answers = [rows[row["prompt"]].answer for row in ROWS]
    assert answers[:5] == ["36", "36", "\\frac{1}{2}", "3.5", "2500"]
    assert rows[ROWS[6]["prompt"]].solution == "x = -14 + 9 = -5"
    assert rows[ROWS[1]["prompt"]].solution == ROWS[1]["answer"]
    assert rows[ROWS[19]["prompt"]].meta == {"family": "listed", "language": "de"}


def test_all_problems_of_a_level_come_once_an_epoch_in_another_order(write):
    rows = [{"prompt": f"q{i}", "answer": i, "level": 1 + i % 2} for i in range(40)]
    spec = write(*rows) + f"?test={TWENTY}"
    source = open_problems(spec, "train", seed=5)
    assert source.finite == 40 and open_problems(spec, "test").finite == 20
    for level, count in ((0, 40), (1, 20), (2, 20)):
        epochs = [[source.problem(n + e * count, level).question for n in range(count)] for e in range(3)]
        assert all(len(set(epoch)) == count and set(epoch) == set(epochs[0]) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
        copy = pickle.loads(pickle.dumps(source))
        assert [copy.problem(n, level).question for n in range(count)] == epochs[0]
    other = open_problems(spec, "train", seed=6)
    assert [other.problem(n) for n in range(40)] != [source.problem(n) for n in range(40)]
    levels = [source.problem(n, level=2, easier=0.5).level for n in range(200)]
    assert 0.35 < levels.count(1) / 200 < 0.65


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (["{"], "is not JSON"),
        (["[1]"], "is not an object"),
        ([{"prompt": "a", "anwser": 1}], "unknown column of Line 1"),
        ([{"prompt": "a", "answer": ""}], "has an empty question or answer"),
        ([{"prompt": "a", "answer": 1, "level": 0}], "has level 0: write 1, 2, .."),
        ([{"prompt": "a", "answer": 1, "level": True}], "has level True"),
        ([{"prompt": "a", "answer": 1, "level": "hard"}], "has level 'hard'"),
        ([], "have none in split 'train'"),
    ],
)
def test_bad_rows_are_sentences(write, rows, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        open_problems(write(*rows), "train")


def test_bad_files_options_and_levels_are_sentences(write):
    with pytest.raises(ValueError, match="No file of problems at 'nowhere.jsonl'"):
        open_problems("jsonl:nowhere.jsonl", "train")
    with pytest.raises(ValueError, match="unknown option of 'jsonl:x.*' 'tset'; did you mean 'test'"):
        open_problems("jsonl:x?tset=y", "train")
    gap = open_problems(write(*({"prompt": f"q{i}", "answer": 1, "level": 3} for i in range(9))), "train")
    with pytest.raises(ValueError, match=r"has no problem of level 2, only of \[3\]"):
        gap.problem(0, level=2)


def test_tfds_has_splits_of_its_own(tmp_path):
    for split, rows in (("train", SUMS[:20]), ("test", SUMS[20:]), ("train[:25%]", None)):
        source = open_problems("tfds:tiny_sums", split, tmp_path)
        problems = everything(source)
        assert source.finite == (len(rows) if rows else 5) and source.num_levels == 1
        for problem in problems:
            i = int(problem.question.split()[2])
            assert problem.answer == f"1{2 * i + 1:03d}" and problem.solution == SUMS[i][1]
            assert score(f"It is {problem.answer}.", problem)["exact"] == 1
        if rows:
            assert {p.question for p in problems} == {question for question, _ in rows}
    other = open_problems("tfds:tiny_sums?answer=hint&solution=answer", "test", tmp_path)
    assert other.at(0).answer == "7" and other.at(0).solution in [answer for _, answer in SUMS]
    with pytest.raises(ValueError, match="has no split 'validation'"):
        open_problems("tfds:tiny_sums", "validation", tmp_path)
    with pytest.raises(
        ValueError, match="unknown column of tfds:tiny_sums train 0 'hnit'; did you mean 'hint'"
    ):
        open_problems("tfds:tiny_sums?answer=hnit", "train", tmp_path)
    with pytest.raises(ValueError, match="TFDS knows no dataset 'no_such_sums'"):
        open_problems("tfds:no_such_sums", "train", tmp_path)


def test_hub_datasets_by_column(monkeypatch):
    asked = []

    def load_dataset(repository, config=None, split=None):
        asked.append((repository, config, split))
        if repository == "me/none":
            raise ConnectionError("no route\nto host")
        return [
            {"problem": f"p{i}", "solution": f"\\boxed{{{i}}}", "level": f"Level {1 + i % 5}"}
            for i in range(30)
        ]

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    columns = "question=problem&answer=solution&level=level"
    spec = f"hf:me/math:train?{columns}&config=all&test=held"
    train, test = open_problems(spec, "train"), open_problems(spec, "test")
    assert asked == [("me/math", "all", "train"), ("me/math", "all", "held")]
    assert train.finite == test.finite == 30 and train.num_levels == 5 and train.at(3, level=2).answer == "16"
    divided = [open_problems(f"hf:me/math:train?{columns}", split).finite for split in ("train", "test")]
    assert sum(divided) == 30 and divided[1] >= 1
    with pytest.raises(
        ValueError, match=r"hf:me/none:train cannot be had \(ConnectionError: no route to host\)"
    ):
        open_problems("hf:me/none:train", "train")
    with pytest.raises(ValueError, match="Problems 'hf:math' name no split"):
        open_problems("hf:math", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match="hf:me/math:train needs the library 'datasets': pip install datasets"
    ):
        open_problems(spec, "train")
