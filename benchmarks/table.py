"""The result of a benchmark as a table and a picture."""

from pathlib import Path

COLUMNS = (
    "operation",
    "tokens",
    "heads",
    "head_dim",
    "form",
    "milliseconds",
    "against_blockwise",
    "peak_mebibytes",
)
HEADER = """# Forward and backward on a CPU

{machine}.
Times are those of the forms taking turns in one process; "x" is a form's time over blockwise's. Peak memory is what a
process of its own grew by in its first run, compilation included. "-": not installed, or more memory than allowed.

| operation | T | H | D | blockwise ms | reference x | PyTorch x | blockwise MiB | reference MiB | PyTorch MiB |
|---|---|---|---|---|---|---|---|---|---|
"""


def markdown(rows: list[dict], machine: str) -> str:
    """One line an operation and length, forms side by side."""
    lines = []
    for key, forms in _grouped(rows).items():
        times = [
            f"{forms['blockwise']['milliseconds']:.0f}",
            *(_cell(forms, f, "against_blockwise") for f in ("reference", "torch")),
        ]
        peaks = [_cell(forms, f, "peak_mebibytes", ".0f") for f in ("blockwise", "reference", "torch")]
        lines.append("| " + " | ".join([*map(str, key), *times, *peaks]) + " |")
    return HEADER.format(machine=machine) + "\n".join(lines) + "\n"


def _grouped(rows):
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in COLUMNS[:4]), {})[row["form"]] = row
    return found


def _cell(forms, form, column, style=".2f"):
    return format(forms[form][column], style) if form in forms else "-"


def plot(rows: list[dict], path: Path) -> None:
    """Time and peak memory against length, a column of pictures an operation, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    operations = list(dict.fromkeys(row["operation"] for row in rows))
    figure, axes = plt.subplots(
        2, len(operations), figsize=(3.2 * len(operations), 5.5), squeeze=False, sharex=True
    )
    for n, operation in enumerate(operations):
        for axis, column, unit in zip(
            axes[:, n], ("milliseconds", "peak_mebibytes"), ("ms", "MiB"), strict=True
        ):
            for form in dict.fromkeys(row["form"] for row in rows):
                points = [
                    (r["tokens"], r[column]) for r in rows if (r["operation"], r["form"]) == (operation, form)
                ]
                if points:
                    axis.loglog(*zip(*points, strict=True), "o-", label=form, base=2)
            axis.set_ylabel(unit)
        axes[0, n].set_title(operation)
        axes[1, n].set_xlabel("tokens")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
