"""The curves of a run, drawn from metrics.jsonl."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attnlab.training import sinks
from attnlab.training.files import LOSS_PLOT

GROUPS = ("train", "validation")
TOKENS = ("train/tokens", "validation/tokens")  # tokens seen so far


def plot_curves(workdir: str | os.PathLike, names: Sequence[str] = ("loss",)) -> pathlib.Path:
    """Draws metrics such as "loss", of training and validation, against steps and tokens; returns the path, `loss.png`.

    A row of panels a metric; the token panel is there if tokens were recorded. A run without values gives a picture
    saying so.
    """
    workdir = pathlib.Path(workdir)
    records = sinks.read_jsonl(workdir / sinks.JSONL)
    axes_values = {"step": np.array([record["step"] for record in records], float)}
    if known := _tokens_by_step(records):
        # A record without its own count (an evaluation, perhaps) takes the line through its neighbours.
        axes_values["tokens"] = np.interp(axes_values["step"], list(known), list(known.values()))
    figure = Figure(figsize=(6 * len(axes_values), 4 * len(names)), layout="constrained")
    rows = figure.subplots(len(names), len(axes_values), squeeze=False)
    for name, panels in zip(names, rows, strict=True):
        for panel, (label, values) in zip(panels, axes_values.items(), strict=True):
            _draw(panel, name, label, values, records)
    path = workdir / LOSS_PLOT
    FigureCanvasAgg(figure).print_png(path)  # this canvas, so that the user's plotting state is not touched
    return path


def _draw(panel, metric: str, label: str, values: np.ndarray, records: list[sinks.Record]) -> None:
    panel.set_xlabel(label)
    panel.set_ylabel(metric)
    for name in (f"{group}/{metric}" for group in GROUPS):
        rows = [i for i, record in enumerate(records) if name in record and np.isfinite(values[i])]
        if rows:
            marker = "." if len(rows) < 100 else None  # few points would be an invisible line
            panel.plot(values[rows], [records[i][name] for i in rows], label=name, marker=marker)
    if panel.has_data():
        panel.legend()
        panel.grid(alpha=0.3)
    else:
        text = f"no {metric} recorded yet"
        panel.text(0.5, 0.5, text, ha="center", va="center", transform=panel.transAxes)


def _tokens_by_step(records: list[sinks.Record]) -> dict[float, float]:
    known = {record["step"]: record[name] for record in records for name in TOKENS if name in record}
    return dict(sorted(known.items()))
