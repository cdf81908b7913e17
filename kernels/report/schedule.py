"""Reads the TPU compiler's own final schedule of a kernel: how many bundles each stretch of code takes.

A TPU core issues one bundle (a very long instruction) a cycle, in order. Compile with

    LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"

and DIR holds for every kernel its bundles and what each of them uses. Bundles of a stretch times how often it runs is a
static estimate of the cycles: waiting for memory is not in it, all issue slots and latencies are. The flags are
undocumented; nothing but the report depends on them.

    for n, each in enumerate(stretches(DIR, "forgetting_forward")): print(n, each)
    static_cycles(stretches(DIR, "forgetting_forward"), {1: 32, 4: 144})
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*((?:>\s*)*)\{")
_BRANCH = re.compile(r"sbr\.rel .*target = \$region")


@dataclass(frozen=True)
class Stretch:
    """Consecutive bundles that run together: from a label or behind a branch to the next one.

    Attributes:
        start: address of the first bundle (bundles are counted, not bytes).
        bundles: their number, which is cycles where nothing waits.
        depth: loops around it; the grid of a `pallas_call` is the outermost, a loop in the kernel the next.
        label: "LB" (a loop's body begins), "PB" or "PF" (a conditional part begins or ends), or "".
        mxu: bundles with work for the matrix units.
        slots: for each unit ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", ...) the issue slots used.
        spills: stores and loads of vector registers that did not fit.
    """

    start: int
    bundles: int
    depth: int
    label: str
    mxu: int
    slots: Mapping[str, int]
    spills: int

    def __str__(self):
        used = " ".join(f"{name}={count}" for name, count in self.slots.items() if count)
        return (
            f"{self.start:#7x} {'>' * self.depth:3} {self.label:2} {self.bundles:6} bundles, "
            f"{self.spills} spills, {self.mxu} with MXU; {used}"
        )


def kernels(dump: str | Path) -> list[str]:
    """Names of the programs in a dump, kernels and the compiler's own fusions."""
    return sorted(
        {
            _name(path)
            for path in Path(dump).glob("*-final_bundles.txt")
            if "schedule-analysis" not in path.name
        }
    )


def stretches(dump: str | Path, kernel: str) -> list[Stretch]:
    """The schedule of the kernel named `kernel`, or of the one whose name contains it (its `name=` in `pallas_call`).

    Raises ValueError if none or several do, with the names there are.
    """
    known = kernels(dump)
    found = [name for name in known if name == kernel] or [name for name in known if kernel in name]
    if len(found) != 1:
        raise ValueError(f"{kernel!r} fits {found or 'none'} of the programs in {dump}: {known}")
    bundles = _bundles(_newest(dump, found[0], "final_bundles"))
    names, use = _utilization(_newest(dump, found[0], "final_hlo-static-per-bundle-utilization"))
    parts, begin = [], 0
    for n in range(1, len(bundles) + 1):
        if n == len(bundles) or bundles[n][1] or bundles[n - 1][3] or bundles[n][2] != bundles[begin][2]:
            parts.append(_stretch(bundles[begin:n], names, use[begin:n]))
            begin = n
    return parts


def static_cycles(schedule: Sequence[Stretch], trips: Mapping[int, float]) -> float:
    """Cycles of a schedule, given how often each stretch (by its place in the list) runs; others run not at all."""
    return sum(schedule[place].bundles * count for place, count in trips.items())


def spills(schedule: Sequence[Stretch]) -> int:
    """Vector registers stored and loaded because they did not fit, anywhere in the kernel."""
    return sum(each.spills for each in schedule)


def loops(schedule: Sequence[Stretch]) -> list[list[Stretch]]:
    """The stretches of each innermost loop with matrix products, in order of address."""
    found, inside = [], []
    for each in schedule:
        if inside and (
            each.depth < inside[-1].depth or (each.label == "LB" and each.depth == inside[-1].depth)
        ):
            found.append(inside)
            inside = []
        if each.label == "LB":
            inside = [each]
        elif inside:
            inside.append(each)
    return [loop for loop in [*found, inside] if sum(each.mxu for each in loop)]


def _name(path):
    """1795530695696054725-NAME-72-final_bundles.txt -> NAME."""
    return re.sub(r"^\d+-(.*)-\d+-[^-]*$", r"\1", path.name)


def _newest(dump, name, what):
    pattern = re.compile(rf"^\d+-{re.escape(name)}-\d+-{re.escape(what)}\.txt$")
    return max(path for path in Path(dump).iterdir() if pattern.match(path.name))


def _bundles(path):
    """(address, label, depth, whether a branch) of every bundle."""
    found = []
    for line in path.read_text().splitlines():
        match = _BUNDLE.match(line)
        if match:
            address, label, nesting = match.groups()
            found.append((int(address, 16), label or "", nesting.count(">"), bool(_BRANCH.search(line))))
        elif found and _BRANCH.search(line):
            found[-1] = (*found[-1][:3], True)
    return found


def _utilization(path):
    """Names of the issue slots and their use, a row a bundle."""
    lines = path.read_text().splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    begin = next(n for n, line in enumerate(lines) if line.startswith("== UTILIZATION"))
    return names, [[int(x) for x in line.split()] for line in lines[begin + 1 :] if line.strip()]


def _stretch(bundles, names, use):
    slots = {name: sum(row[n] for row in use) for n, name in enumerate(names)}
    filled = slots.get("VLOAD:FILL", 0) + slots.get("VSTORE:SPILL", 0)
    mxu = sum(1 for row in use if row[names.index("MXU")])
    address, label, depth, _ = bundles[0]
    return Stretch(address, len(bundles), depth, label, mxu, slots, filled)
