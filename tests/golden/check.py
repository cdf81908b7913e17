"""Recompute golden files and compare: a verdict a file, with the worst relative error of outputs and of gradients."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from tests.golden import families
from tests.golden.registry import Family, Golden, Unsupported, find_family


@dataclass
class Verdict:
    """What became of one file; `problems` is empty when it passed."""

    path: Path
    family: str = ""
    implementations: list[str] = field(default_factory=list)
    compared: int = 0
    worst_output: float = 0.0
    worst_gradient: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def line(self) -> str:
        """One line: verdict, file, errors, what computed it, and what is wrong."""
        head = f"{'ok  ' if self.passed else 'FAIL'} {self.path}"
        if not self.family:
            return f"{head}  {'; '.join(self.problems)}"
        text = f"{head}  outputs {self.worst_output:.1e}  gradients {self.worst_gradient:.1e}"
        text += f"  {self.family} ({', '.join(self.implementations)}; {self.compared} arrays)"
        return text if self.passed else f"{text}  {'; '.join(self.problems)}"


def find_files(folders: Iterable[str | Path]) -> list[Path]:
    """All npz files under the folders, in order; FileNotFoundError for a folder that is missing or has none."""
    found = []
    for folder in map(Path, folders):
        files = [folder] if folder.is_file() else sorted(folder.rglob("*.npz"))
        if not files:
            raise FileNotFoundError(f"{folder} holds no .npz file; give a folder of golden files")
        found += files
    return found


def check_files(paths: Iterable[Path]) -> Iterator[Verdict]:
    families.load()
    return map(check_file, paths)


def check_file(path: Path) -> Verdict:
    """Recompute one file in float64. Whatever goes wrong in it becomes part of the verdict."""
    verdict = Verdict(path)
    try:
        golden = Golden.load(path)
        found = find_family(golden)
        verdict.family = found.name
        with jax.enable_x64(True):
            for implementation, values in found.compute(golden):
                verdict.implementations.append(implementation)
                _compare(verdict, found, golden, implementation, values)
        if not verdict.implementations:
            verdict.problems.append("nothing computed it")
    except Unsupported as error:
        verdict.problems.append(f"unsupported: {error}")
    except Exception as error:  # a broken file or family must not hide the other files' verdicts
        text = " ".join(str(error).split())
        verdict.problems.append(f"{type(error).__name__}: {text[:300]}")
    return verdict


def _compare(verdict: Verdict, found: Family, golden: Golden, implementation: str, values: dict) -> None:
    missing = golden.results.keys() - values.keys()
    if missing:
        verdict.problems.append(f"{implementation} does not compute {', '.join(sorted(missing))}")
    for key in golden.results.keys() & values.keys():
        want, got = golden.arrays[key], np.asarray(values[key])
        error = relative_error(got, want)
        verdict.compared += 1
        if key.startswith("grad"):
            verdict.worst_gradient = _worse(verdict.worst_gradient, error)
        else:
            verdict.worst_output = _worse(verdict.worst_output, error)
        bound = found.bound(golden, key)
        if not error <= bound:
            verdict.problems.append(f"{implementation} {key}: {error:.1e} > {bound:.0e}")


def _worse(a: float, b: float) -> float:
    return b if not b <= a else a  # a NaN stays


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest |got - want| over the largest |want|; infinite where shapes, infinities or exact values differ.

    Integers and booleans must be equal. An array of zeros is compared absolutely.
    """
    if got.shape != want.shape:
        return np.inf
    if want.dtype.kind in "biuUS":
        return 0.0 if np.array_equal(got, want) else np.inf
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True) or not np.all(
        np.isfinite(got[finite])
    ):
        return np.inf
    if not finite.any():
        return 0.0
    scale = np.abs(want[finite]).max()
    return float(np.abs(got[finite] - want[finite]).max() / (scale or 1.0))
