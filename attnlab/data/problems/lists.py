r"""Lists of questions and answers as problems: JSON lines, TFDS datasets, datasets of the Hugging Face hub.

The answer is what a worked solution ends in, if it is one: its last \boxed{..}, or what follows ####.
"""

import json
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attnlab.data import prepared
from attnlab.data.problems.answers import correct, gold
from attnlab.data.problems.problem import Problem, split_of
from attnlab.data.specs import known

Rows = Iterator[tuple[str, Mapping[str, Any]]]  # where a row stands, and its values by name


class Listed:
    """The family of all listed problems: right if the answers are equal (see answers.py)."""

    name, scores = "listed", ("exact",)

    @staticmethod
    def score(text: str, problem: Problem) -> dict[str, float]:
        return {"exact": float(correct(text, problem.answer))}


def json_lines(name: str, split: str, data_dir: Path) -> list[Problem]:
    """jsonl:FILE[?test=FILE]: an object a line, with `prompt`, `answer`, and perhaps `solution` and `level`."""
    file, options = _options(f"jsonl:{name}", name, ("test",))
    columns = {"question": "prompt", "answer": "answer", "solution": "solution", "level": "level"}
    return _divided(file, options.get("test"), split, lambda path: _problems(_lines(path), columns))


def tfds_records(name: str, split: str, data_dir: Path) -> list[Problem]:
    """tfds:NAME[?question=FEATURE&answer=FEATURE..]: the splits are the dataset's own, and may be sliced."""
    dataset, options = _options(f"tfds:{name}", name, ("question", "answer", "solution", "level"))
    builder, where = prepared.tfds_builder(dataset, data_dir), f"tfds:{dataset}"
    records = prepared.records(builder, where, split)
    rows = ((f"{where} {split} {i}", _decoded(records[i])) for i in range(len(records)))
    return _problems(rows, {"question": "question", "answer": "answer"} | options)


def hub_rows(name: str, split: str, data_dir: Path) -> list[Problem]:
    """hf:REPO:SPLIT[?question=COLUMN&answer=COLUMN&solution=COLUMN&level=COLUMN&config=NAME&test=SPLIT]"""
    spec, columns = f"hf:{name}", ("question", "answer", "solution", "level")
    dataset, options = _options(spec, name, (*columns, "config", "test"))
    repository, _, hub_split = dataset.rpartition(":")
    if not repository or not hub_split:
        raise ValueError(
            f"Problems {spec!r} name no split: write one like 'hf:openai/gsm8k:train?config=main'."
        )
    config, test = options.pop("config", None), options.pop("test", None)
    columns = {"question": "question", "answer": "answer"} | options
    return _divided(
        hub_split, test, split, lambda part: _problems(_downloaded(repository, config, part), columns)
    )


KINDS: dict[str, Callable[[str, str, Path], list[Problem]]] = {
    "jsonl": json_lines,
    "tfds": tfds_records,
    "hf": hub_rows,
}


def _options(spec: str, name: str, names: Iterable[str]) -> tuple[str, dict[str, str]]:
    name, _, query = name.partition("?")
    options = dict(urllib.parse.parse_qsl(query))
    for option in options:
        known(option, names, f"option of {spec!r}")
    return name, options


def _divided(part: str, test: str | None, split: str, read: Callable[[str], list[Problem]]) -> list[Problem]:
    """With a part of its own for tests, all of the right one; else those rows whose hash belongs to the split."""
    if test is not None:
        return read(test if split == "test" else part)
    return [problem for problem in read(part) if split_of(problem.identity) == split]


def _problems(rows: Rows, columns: Mapping[str, str]) -> list[Problem]:
    return [_problem(where, row, columns) for where, row in rows]


def _problem(where: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> Problem:
    for column in (columns["question"], columns["answer"]):
        known(column, row, f"column of {where}")
    question, answer = _text(row[columns["question"]]), _text(row[columns["answer"]])
    final = gold(answer)
    if not question.strip() or not final:
        raise ValueError(f"{where} has an empty question or answer: give both, or leave it out.")
    solution = row.get(columns.get("solution", ""))
    meta = {key: value for key, value in row.items() if key not in columns.values()}
    return Problem(
        question=question,
        answer=final,
        solution=answer if solution is None else _text(solution),
        identity=" ".join(question.split()),
        level=_level(where, row.get(columns.get("level", ""), 1)),
        meta=meta | {"family": Listed.name},
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _level(where: str, value: Any) -> int:
    """A level of 1, 2, .. or a text that ends in one, such as "Level 5"."""
    digits = re.search(r"[0-9]{1,4}$", str(value))
    if isinstance(value, bool) or digits is None or str(value).startswith("-") or int(digits[0]) < 1:
        raise ValueError(f"{where} has level {value!r}: write 1, 2, .. or 'Level 1'.")
    return int(digits[0])


def _lines(path: str) -> Rows:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"No file of problems at {path!r}: name one of JSON lines with 'prompt' and 'answer'."
        )
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"Line {number} of {path!r}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON ({error}): write an object a line.") from error
            if not isinstance(row, dict):
                raise ValueError(f'{where} is not an object: write {{"prompt": .., "answer": ..}}.')
            yield where, row


def _decoded(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
        for key, value in record.items()
    }


def _downloaded(repository: str, config: str | None, split: str) -> Rows:
    where = f"hf:{repository}:{split}"
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{where} needs the library 'datasets': pip install datasets, or use 'jsonl:FILE'."
        ) from error
    try:
        rows = datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # downloads fail in as many ways as there are hosts and formats
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{where} cannot be had ({type(error).__name__}: {reason}): check its name, config and split, load it once "
            "where there is a network, or use 'jsonl:FILE'."
        ) from error
    for number, row in enumerate(rows):
        yield f"{where} {number}", row
