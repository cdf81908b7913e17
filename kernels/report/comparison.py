"""Forgetting attention on TPU beside JAX's own attention kernels, by the compiler's final schedule of each.

    python -m kernels.report.comparison [--targets=v5e,v5p,v6e] [--quick] [--out=FILE.json]

Nothing runs: bundles of the schedule (kernels/report/schedule.py; one is a cycle where nothing waits) are multiplied by
how often they run (kernels/report/comparison_cycles.py). Causal, bfloat16, 16k tokens in all, heads = 2048 / D, as in
the benchmark of FlashAttention-3; figures are for one query head of one batch row. Lengths enter a schedule only as
constants, once block sizes are fixed and it is known whether a block has one or several blocks and fetches to go
through (for JAX's kernels also whether T is above 4096): of lengths alike in that, the longest is compiled.

Splash attention's figure is the better of blocks of 512 and of 1024, for each pass; flash attention has 512. Theirs
need lengths that are multiples of 128, so shorter ones are filled up; splash attention leaves scaling q to its caller,
where it is not counted; flash attention has no groups.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from kernels.report import environment

COMPARED = ("gates", "no_gates", "splash", "flash")
LENGTHS, DIMENSIONS = (512, 1024, 2048, 4096, 8192, 16384), (64, 128, 256)


def markdown(found: dict) -> str:
    """The section of the report's page, from what `measure` gave."""
    rows = found["rows"]
    text = _HEADER + "".join("| " + " | ".join(_cells(row)) + " |\n" for row in rows)
    rows = [row for row in rows if any("forward_spills" in (row[what] or {}) for what in COMPARED)]
    spills = "".join("| " + " | ".join(_spills(row)) + " |\n" for row in rows)
    return text + (_SPILLS + spills if spills else "")


_HEADER = """
## Beside JAX's own attention

Static cycles of forgetting attention, with gates and without (then it is softmax attention), and of JAX's
`splash_attention` and `flash_attention` for TPU: causal, bfloat16, for one head of one batch row. **These are
instructions of the compiler's final schedule times how often they run: waiting for memory is not in them, nothing
ran.** Shapes as in FlashAttention-3's benchmark: batch rows times T = 16k tokens, heads times D = 2048. The ratio is
ours with gates, and in brackets without, to the better one of JAX's, which are filled up to 128 where T is shorter.

| | | | | forward | | | | | backward | | | | |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
| T | D | heads | target | gates | none | splash | flash | ratio | gates | none | splash | flash | ratio |
"""


_SPILLS = """
Saves and restores of vector registers in the code of the same kernels (loop bodies counted once; backward: both
kernels together; splash attention with the blocks that gave the cycles above):

| | | | | forward | | | | backward | | | |
|---|---|---|---|---|---|---|---|---|---|---|---|
| T | D | heads | target | gates | none | splash | flash | gates | none | splash | flash |
"""


def _cells(row):
    cells = _shape(row)
    for which in ("forward", "backward"):
        found = [row[what][which] if row[what] else None for what in COMPARED]
        best = min((each for each in found[2:] if each), default=None)
        ratios = [f"{each / best:.2f}" if each and best else "-" for each in found[:2]]
        cells += [f"{each:,.0f}" if each else "-" for each in found] + [f"{ratios[0]} ({ratios[1]})"]
    return cells


def _spills(row):
    found = [
        (row[what] or {}).get(f"{which}_spills") for which in ("forward", "backward") for what in COMPARED
    ]
    return _shape(row) + ["-" if each is None else str(each) for each in found]


def _shape(row):
    heads = str(row["heads"]) + (f" on {row['kv_heads']}" if row["kv_heads"] != row["heads"] else "")
    note = f", {100 * row['visited']:.0f} % of the blocks visited by pruning" if row["pruned"] else ""
    return [str(row["T"]), str(row["D"]), heads + note, row["target"]]


def _shapes(targets, quick):
    from kernels.report.comparison_programs import Shape

    if quick:
        return [Shape(512, 64, target=target) for target in targets]
    shapes = []
    for target in targets:
        few = [Shape(4096, 128, target=target)]
        if target == "v5e":
            few = [Shape(T, D) for D in DIMENSIONS for T in LENGTHS]
            few += [Shape(63, 128), Shape(4096, 128, 8, 1), Shape(4096, 128, pruned=True)]
        shapes += few
    return shapes


def main(arguments: list[str] | None = None) -> int:
    """Returns how many figures could not be had (at most 100), as the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.report.comparison", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--targets", default="v5e,v5p,v6e", help="TPUs, comma-separated; v5e gets all shapes, others one"
    )
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--out", type=Path, help="where to write the figures, as JSON")
    options = parser.parse_args(arguments)
    names = options.targets.split(",")
    with tempfile.TemporaryDirectory(prefix="kernel-comparison-") as folder:
        environment.prepare(names, Path(folder) / "dump")
        from kernels.report import comparison_run, run  # after the flags, which the compiler reads once

        rows = comparison_run.measure(_shapes(names, options.quick), Path(folder) / "dump")
    command = "python -m kernels.report.comparison " + " ".join(sys.argv[1:])
    found = {"command": command, "versions": run.versions(), "rows": rows}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return min(sum(len(row["errors"]) for row in rows), 100)


if __name__ == "__main__":
    sys.exit(main())
