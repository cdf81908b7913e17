"""What a golden file is, and which code recomputes it.

A file is an npz with a JSON text `meta` (settings and origin) and arrays named in.*, param.*, cot.* (given: inputs,
parameters, cotangents); everything else (out.*, grad.*, ...) is to be recomputed. A family is a function that does so
for one kind of file. It finds its files by their settings and arrays alone, never by their names.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GIVEN = ("in.", "param.", "cot.")
STORED_AS_FLOAT32 = 5e-7  # nothing is known better than this of an array stored in float32


class Unsupported(Exception):
    """The settings of a file ask for something that does not exist here; the message is a sentence."""


@dataclass(frozen=True)
class Golden:
    """One file."""

    path: Path
    meta: dict
    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: Path) -> "Golden":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != "meta"}
            meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
        return cls(Path(path), meta, arrays)

    def expected(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose names begin with `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): x for name, x in self.arrays.items() if name.startswith(prefix)}

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return self.expected("in.")

    @property
    def params(self) -> dict[str, np.ndarray]:
        return self.expected("param.")

    @property
    def cotangents(self) -> dict[str, np.ndarray]:
        return self.expected("cot.")

    @property
    def results(self) -> dict[str, np.ndarray]:
        """Everything that has to be recomputed, by full name."""
        return {name: x for name, x in self.arrays.items() if not name.startswith(GIVEN)}


Compute = Callable[[Golden], Iterable[tuple[str, dict]]]


@dataclass(frozen=True)
class Family:
    """A kind of file: `when` recognises it, `compute` yields (implementation, {full name: array}) pairs."""

    name: str
    when: Callable[[Golden], bool]
    compute: Compute
    tolerance: float | Callable[[Golden, str], float]

    def bound(self, golden: Golden, key: str) -> float:
        """Largest relative error allowed for the array `key`."""
        bound = self.tolerance(golden, key) if callable(self.tolerance) else self.tolerance
        return max(bound, STORED_AS_FLOAT32) if golden.arrays[key].dtype == np.float32 else bound


FAMILIES: list[Family] = []


def family(name: str, *, when: Callable[[Golden], bool], tolerance=1e-10):
    """Function decorator: the function computes the files that `when` recognises."""

    def add(compute: Compute) -> Compute:
        FAMILIES.append(Family(name, when, compute, tolerance))
        return compute

    return add


def find_family(golden: Golden) -> Family:
    """The one family that recognises a file; Unsupported when none or several do."""
    found = [each for each in FAMILIES if each.when(golden)]
    if len(found) == 1:
        return found[0]
    names = " and ".join(each.name for each in found) or "no family"
    keys = ", ".join(sorted(golden.arrays)[:6])
    raise Unsupported(f"{names} recognises its settings and arrays ({keys}, ...); exactly one must")
