"""Where metrics go: JSON lines, CSV tables, TensorBoard events, Weights & Biases. One class each, one method.

`metrics.jsonl` is the record of the run; the CSV tables are rebuilt from it when a run resumes. JSON has no
NaN or infinity, so these are written as the strings "nan", "inf" and "-inf"; `read_jsonl` gives floats back.
"""

from __future__ import annotations

import csv
import json
import math
import os
import pathlib
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

Scalars = Mapping[str, float]
Record = dict[str, float]  # {"step": ..., "train/loss": ..., ...}

JSONL = "metrics.jsonl"
UNGROUPED = "metrics"  # CSV table of the names without a "/"


class Sink(Protocol):
    """Receives every write in order, on one thread."""

    def write(self, step: int, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object per line, flushed at once: a killed run loses at most the line being written."""

    def __init__(self, path: pathlib.Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: Scalars) -> None:
        self._file.write(_json_line({"step": step, **scalars}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class CsvTables:
    """One table per group: "train/loss" is column `loss` of `train.csv`; what was not given is empty."""

    def __init__(self, folder: pathlib.Path, records: Iterable[Record] = ()):
        """Starts with the rows of these records, whatever tables are there."""
        self._folder = folder
        self._columns: dict[str, list[str]] = {}  # group -> header
        for group, rows in _tables(records).items():
            self._columns[group] = list(dict.fromkeys(name for row in rows for name in row))
            self._rewrite(group, rows)

    def write(self, step: int, scalars: Scalars) -> None:
        for group, row in _grouped(step, scalars).items():
            columns = self._columns.get(group, [])
            if new := [name for name in row if name not in columns]:
                self._widen(group, columns + new)
            with self._path(group).open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns[group]).writerow(row)

    def close(self) -> None:
        """Nothing is held open between writes."""

    def _widen(self, group: str, columns: list[str]) -> None:
        rows = []
        if group in self._columns:
            with self._path(group).open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        self._columns[group] = columns
        self._rewrite(group, rows)

    def _rewrite(self, group: str, rows: list[dict]) -> None:
        temporary = self._folder / f"{group}.csv.tmp"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns[group])
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._path(group))

    def _path(self, group: str) -> pathlib.Path:
        return self._folder / f"{group}.csv"

    @staticmethod
    def remove(folder: pathlib.Path, records: Iterable[Record]) -> None:
        """Deletes the tables that these records were written to."""
        for group in _tables(records):
            (folder / f"{group}.csv").unlink(missing_ok=True)


class TensorBoard:
    """Event files; after a resume TensorBoard hides what an earlier run wrote from `purge_step` on."""

    def __init__(self, folder: pathlib.Path, purge_step: int | None):
        from tensorboardX import SummaryWriter  # imported late: protobuf is slow to load

        # Two writers within one second would share a file name without the suffix.
        suffix = f".{os.getpid()}.{purge_step}"
        self._writer = SummaryWriter(
            str(folder), purge_step=purge_step, flush_secs=10, filename_suffix=suffix
        )

    def write(self, step: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run, continued under the same id when the training resumes."""

    def __init__(self, folder: pathlib.Path, project: str):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"wandb={project!r} asks for Weights & Biases, which is not installed: pip install wandb, or "
                "leave the option out."
            ) from error
        self._run = wandb.init(project=project, dir=str(folder), id=_run_id(folder), resume="allow")
        # Its own step counter refuses to go back, which a resume needs, so ours is an ordinary value.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Scalars) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()


def read_jsonl(path: pathlib.Path) -> list[Record]:
    """The records of a metrics file in order, none if there is no file; a line cut off by a kill is left out.

    Raises ValueError naming the line if any other line is not a record.
    """
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # without its newline a line is unfinished
        try:
            content = json.loads(line)
            scalars = {name: float(value) for name, value in content.items()}
            records.append(scalars | {"step": int(content["step"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} line {number} is not a metrics record ({error}); delete it.") from error
    return records


def rewind_jsonl(path: pathlib.Path, last_step: int) -> list[Record]:
    """Drops the records after `last_step` (and a cut-off last line) from the file; returns those kept."""
    kept = [record for record in read_jsonl(path) if record["step"] <= last_step]
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(_json_line(record) for record in kept), encoding="utf-8")
    os.replace(temporary, path)
    return kept


def _json_line(record: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else str(value) for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _grouped(step: int, scalars: Scalars) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, value in scalars.items():
        group, slash, column = name.partition("/")
        key, column = (group, column) if slash else (UNGROUPED, name)
        groups.setdefault(key, {"step": step})[column] = value
    return groups


def _tables(records: Iterable[Record]) -> dict[str, list[dict[str, Any]]]:
    tables: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        scalars = {name: value for name, value in record.items() if name != "step"}
        for group, row in _grouped(int(record["step"]), scalars).items():
            tables.setdefault(group, []).append(row)
    return tables


def _run_id(folder: pathlib.Path) -> str:
    path = folder / "wandb_id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()
