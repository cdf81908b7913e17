"""docs/kernels.md, made of the figures of one or more runs of the report."""

from collections.abc import Callable, Iterable

from kernels.report import comparison

HEADER = """# The Pallas kernels, as compiled

Every Pallas kernel of `kernels/` was compiled ahead of time by the real compilers, forward and backward, for the
machines below. **None of them was here: no run time on hardware was measured**, and nothing below says "runs on".
Tests simulate the kernels on a CPU and compare them with the reference (`test_tpu.py`, `test_gpu.py`).
This page is generated; do not edit it. `make report` makes it anew; the figures come from

{commands}

A full run gives v5e and sm_90 every shape, and the other machines the first of each kernel in bfloat16 and in
float32; a run that was cut off (it goes on with --resume) has fewer, and --quick has one small shape a kernel. Each
line is one shape, with its gradient unless it says "forward"; figures of its kernels, in the order of the program, are
divided by "/".
"""
TPU = """
**TPU** (Mosaic): VMEM in KiB; bundles are the instructions of the kernel's whole static schedule (loop bodies counted
once), spills the register saves and restores among them, MXU the share of bundles that use the matrix unit; FLOPs,
bytes and microseconds are the compiler's estimates for the program; temporaries are what it adds to HBM, in MiB.

| shape | target | VMEM | bundles | spills | MXU % | GFLOP | MiB | est. us | temp. |
|---|---|---|---|---|---|---|---|---|---|
"""
GPU = """
**GPU** (Triton, ptxas): registers a thread, bytes spilled to local memory, shared memory in KiB a block, threads a
block, whether tensor cores are used, temporaries in MiB.

| shape | target | registers | spills | shared | threads | tensor cores | temp. |
|---|---|---|---|---|---|---|---|
"""


def render(runs: Iterable[dict]) -> str:
    """The page as Markdown, from dictionaries of `command`, `versions` and `records` (see `kernels.report.run`)."""
    runs = list(runs)
    commands = "\n".join(f"    {run['command']}    # {_versions(run)}" for run in runs)
    records = [record for run in runs for record in run.get("records", ())]
    parts = [HEADER.format(commands=commands), _summary(records)]
    parts += [comparison.markdown(run) for run in runs if "rows" in run]
    for kernel in dict.fromkeys(record["kernel"] for record in records):
        parts.append(_section(kernel, [r for r in records if r["kernel"] == kernel]))
    return "".join(parts)


def _versions(run):
    return ", ".join(f"{name} {version}" for name, version in run["versions"].items())


def _summary(records):
    """How many shapes of each kernel compiled for each target."""
    targets = list(dict.fromkeys(record["target"] for record in records))
    lines = [
        "\n## Compiled of tried\n",
        "| kernel | " + " | ".join(targets) + " |",
        "|---" * (len(targets) + 1) + "|",
    ]
    for kernel in dict.fromkeys(record["kernel"] for record in records):
        cells = []
        for target in targets:
            tried = [r for r in records if (r["kernel"], r["target"]) == (kernel, target)]
            cells.append(f"{sum('error' not in r for r in tried)} of {len(tried)}" if tried else "-")
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _section(kernel, records):
    good = [record for record in records if "error" not in record]
    on_gpu = [r for r in good if r["target"].startswith("sm_")]
    text = f"\n## {kernel}\n"
    text += _table(TPU, [r for r in good if r not in on_gpu], _tpu_cells) + _table(GPU, on_gpu, _gpu_cells)
    failures = [f"- {r['label']} for {r['target']}: {r['error']}\n" for r in records if "error" in r]
    return text + ("\nDid not compile:\n\n" + "".join(failures) if failures else "")


def _table(header: str, records: list[dict], cells: Callable[[dict], list[str]]) -> str:
    lines = []
    for record in records:
        shape = record["label"] + ("" if record["backward"] else " forward")
        lines.append("| " + " | ".join([shape, record["target"], *cells(record)]) + " |\n")
    return header + "".join(lines) if lines else ""


def _tpu_cells(record):
    costs = (
        record.get("flops", 0) / 1e9,
        record.get("bytes", 0) / 2**20,
        record.get("optimal_seconds", 0) * 1e6,
    )
    return [
        _each(record, lambda k: f"{k['vmem'] / 2**10:.0f}"), _each(record, lambda k: str(k["bundles"])),
        _each(record, lambda k: str(k["spills"])), _each(record, lambda k: f"{100 * k['mxu']:.0f}"),
        *(f"{x:.3g}" for x in costs), f"{record['temporaries'] / 2**20:.3g}",
    ]  # fmt: skip


def _gpu_cells(record):
    return [
        _each(record, lambda k: str(k["registers"])), _each(record, lambda k: str(k["spills"])),
        _each(record, lambda k: f"{k['shared'] / 2**10:.0f}"), _each(record, lambda k: str(k["threads"])),
        _each(record, lambda k: "yes" if k["tensor_cores"] else "no"), f"{record['temporaries'] / 2**20:.3g}",
    ]  # fmt: skip


def _each(record, cell):
    return " / ".join(cell(kernel) for kernel in record["kernels"]) or "-"
