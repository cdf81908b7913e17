"""Forward and backward of each operation on this CPU: blockwise beside the quadratic JAX form and PyTorch.

    python -m benchmarks.ops [--lengths=2048,4096,8192] [--ops=softmax,...] [--repeats=5] [--out=runs/benchmarks/ops]

Forms of one operation and length take turns in one process, so that their ratio holds when the machine's speed drifts;
peak memory is measured in a process of its own for each. Writes ops.csv, ops.md and ops.png into --out. PyTorch takes
part if it is installed. Forms that would need more than --memory GiB are left out, shown as "-".
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from benchmarks import table

OPERATIONS = ("softmax", "forgetting", "cosformer", "lssar", "tropical")
# Bytes a pair of query and key (tropical: times the head size), as measured at T = 512; the others are linear in T.
BYTES_PER_PAIR = {
    ("softmax", "reference"): 29, ("softmax", "torch"): 4, ("forgetting", "reference"): 29, ("forgetting", "torch"): 41,
    ("cosformer", "reference"): 18, ("lssar", "reference"): 49, ("lssar", "torch"): 90, ("tropical", "reference"): 17,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    rows = []
    for operation in options.ops.split(","):
        for length in map(int, options.lengths.split(",")):
            rows += _rows(operation, length, options)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "ops.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (options.out / "ops.md").write_text(table.markdown(rows, _machine(options)))
    table.plot(rows, options.out / "ops.png")
    print(table.markdown(rows, _machine(options)))
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,4096,8192", help="numbers of tokens, comma-separated")
    parser.add_argument("--ops", default=",".join(OPERATIONS), help="operations, comma-separated")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of each form, of which the median counts"
    )
    parser.add_argument(
        "--memory", type=float, default=12.0, help="GiB; forms that would need more are left out"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ops"))
    return parser


def _rows(operation, length, options):
    """One row a form of an operation at a length."""
    names = ["blockwise", "reference", *(["torch"] if importlib.util.find_spec("torch") else [])]
    names = [name for name in names if _gibibytes(operation, name, length, options) <= options.memory]
    seconds = _child(operation, length, options, options.repeats, names)["seconds"]
    peaks = {name: _child(operation, length, options, 0, [name])["peak_bytes"] for name in names}
    first = {"operation": operation, "tokens": length, "heads": options.heads, "head_dim": options.head_dim}
    rows = [
        first
        | {"form": name, "milliseconds": round(1e3 * seconds[name], 2)}
        | {"against_blockwise": round(seconds[name] / seconds["blockwise"], 3)}
        | {"peak_mebibytes": round(peaks[name] / 2**20, 1)}
        for name in names
    ]
    for row in rows:
        print(
            "{operation} T={tokens} {form}: {milliseconds} ms, {peak_mebibytes} MiB".format(**row), flush=True
        )
    return rows


def _gibibytes(operation, form, length, options):
    """About what a form will need; blockwise is never left out."""
    per = BYTES_PER_PAIR.get((operation, form), 0)
    return per * options.heads * length**2 * (options.head_dim if operation == "tropical" else 1) / 2**30


def _child(operation, length, options, repeats, names):
    numbers = [str(n) for n in (length, options.heads, options.head_dim, repeats)]
    command = [sys.executable, "-m", "benchmarks.measure", operation, *numbers, *names]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _machine(options):
    import jax

    names = [f"JAX {jax.__version__}"]
    if importlib.util.find_spec("torch") is not None:
        names.append(f"PyTorch {importlib.metadata.version('torch')}")
    cores = f"{os.cpu_count()} {platform.machine()} cores"
    return f"{cores}, {', '.join(names)}, float32, B=1, medians of {options.repeats}"


if __name__ == "__main__":
    sys.exit(main())
