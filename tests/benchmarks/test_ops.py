"""The benchmark runs and writes what it promises, and compares results before it times them. No timing is judged."""

import csv

import numpy as np
import pytest

from benchmarks import measure, ops, table


def test_forms_of_an_operation_are_compared_before_they_are_timed():
    one = [np.ones((2, 3), np.float32), np.full(2, 4.0)]
    measure._compare("softmax", {"blockwise": one, "reference": one})
    other = [one[0], one[1] + 0.1]
    with pytest.raises(
        ArithmeticError, match="softmax: gradient 1 of reference differs from blockwise by 2.5e-02"
    ):
        measure._compare("softmax", {"blockwise": one, "reference": other})


@pytest.mark.parametrize(
    "names", ["softmax", pytest.param(",".join(ops.OPERATIONS[1:]), marks=pytest.mark.thorough)]
)
def test_a_run_writes_a_table_in_two_forms_and_a_picture(names, tmp_path):
    options = [
        f"--ops={names}",
        "--lengths=37",
        "--heads=2",
        "--head_dim=8",
        "--repeats=1",
        f"--out={tmp_path}",
    ]
    assert ops.main(options) == 0
    with (tmp_path / "ops.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["operation"] for row in rows} == set(names.split(","))
    assert {row["form"] for row in rows} >= {"blockwise", "reference"}
    assert tuple(rows[0]) == table.COLUMNS and all(float(row["milliseconds"]) > 0 for row in rows)
    assert (tmp_path / "ops.md").read_text().count("\n| ") == 1 + len(names.split(","))
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_forms_that_need_more_memory_than_allowed_are_left_out(tmp_path):
    ops.main(
        ["--ops=softmax", "--lengths=11", "--heads=1", "--head_dim=4", "--memory=0", f"--out={tmp_path}"]
    )
    assert "| softmax | 11 | 1 | 4 |" in (tmp_path / "ops.md").read_text()
    assert "reference" not in (tmp_path / "ops.csv").read_text()
