"""Results on disk: readable, whole, and without NaN in JSON."""

import csv
import json

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from attnlab.evaluation import Result, write

ABOUT = {"step": 3, "split": "test", "options": {"batches": 1}}


def a_figure():
    figure = Figure()
    figure.subplots().plot([1, 2])
    return figure


@pytest.mark.smoke
def test_all_four_files_are_readable(tmp_path):
    rows = [{"position": 0, "text": 'a "quoted"\nline'}, {"position": 1, "text": "b, c"}]
    scalars = {"loss": 1.5, "loss_se": float("nan"), "worst": float("inf")}
    paths = write(Result(scalars, rows, a_figure, "text\n", "held_out", ABOUT), tmp_path / "eval")
    assert [path.name for path in paths] == ["held_out.json", "held_out.csv", "held_out.txt", "held_out.png"]
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == sorted(path.name for path in paths)
    content = json.loads(paths[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content == {
        "evaluator": "held_out",
        "scalars": {"loss": 1.5, "loss_se": None, "worst": None},
        **ABOUT,
    }
    with paths[1].open(newline="") as file:
        assert [dict(row) for row in csv.DictReader(file)] == [
            {k: str(v) for k, v in row.items()} for row in rows
        ]
    assert paths[2].read_text() == "text\n"
    assert matplotlib.image.imread(paths[3]).ndim == 3


def test_only_what_there_is_is_written(tmp_path):
    assert [path.name for path in write(Result({"loss": 1.0}, name="generate"), tmp_path)] == [
        "generate.json"
    ]


def test_a_failing_figure_leaves_the_old_one(tmp_path):
    path = write(Result({}, figure=a_figure, name="x"), tmp_path)[-1]
    before = path.read_bytes()

    def broken():
        raise RuntimeError("no figure")

    with pytest.raises(RuntimeError):
        write(Result({}, figure=broken, name="x"), tmp_path)
    assert path.read_bytes() == before
