"""Reward, entropy, effective sample size, groups without a gradient and held-out accuracies of all methods.

Upper row against steps, lower row against tokens; lines are means over seeds, bands reach from the lowest to the
highest seed. Training metrics are moving averages, as a step sees few problems.

Letters: S seeds, T recorded steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attnlab.evaluation.estimates import moving_average
from attnlab.reproduce.histories import HELD_OUT, Curve, History

# title -> curves of a panel, with the style of each
PANELS = {
    "training reward": {"reward": "-"},
    "entropy (nats)": {"entropy": "-"},
    "effective sample size": {"ess": "-"},
    "groups without a gradient": {"zero_std": "-"},
    "held out: pass@8; dashed mean@8": {"pass_at_8": "-", "mean_at_8": "--"},
}
SMOOTHED = 9  # steps, odd
AXES = {"steps": ("step", 1), "tokens": ("thousand tokens", 1000)}  # curves' axis -> (label, unit)


def draw(runs: Mapping[str, Sequence[History]], path: Path) -> Path:
    """Write the figure of runs by method as PNG; returns its path."""
    figure = Figure(figsize=(20, 7), dpi=72, layout="constrained")
    rows = figure.subplots(2, len(PANELS))
    for axes, axis in zip(rows, AXES, strict=True):
        for panel, (title, curves) in zip(axes, PANELS.items(), strict=True):
            panel.set(title=title, xlabel=AXES[axis][0])
            panel.grid(alpha=0.3)
            for name, style in curves.items():
                for number, (method, histories) in enumerate(runs.items()):
                    label = method if style == "-" else None
                    _band(panel, histories, name, axis, color=f"C{number}", linestyle=style, label=label)
    rows[0, 0].legend()
    FigureCanvasAgg(figure).print_png(path)  # this canvas: no display, nor the user's plotting state
    return path


def _band(panel, histories: Sequence[History], name: str, axis: str, **style) -> None:
    x, lowest, mean, highest = band(
        [history.curves[name] for history in histories], name not in HELD_OUT, axis
    )
    x = x / AXES[axis][1]
    panel.plot(x, mean, marker="." if name in HELD_OUT else None, **style)
    panel.fill_between(x, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)


def band(curves: Sequence[Curve], smooth: bool, axis: str) -> tuple[np.ndarray, ...]:
    """(x, lowest, mean, highest) [T] over seeds at the steps that all have; tokens are the mean over seeds."""
    steps = sorted(set.intersection(*(set(curve.steps.tolist()) for curve in curves)))
    rows = [np.isin(curve.steps, steps) for curve in curves]
    values = np.stack([curve.values[there] for curve, there in zip(curves, rows, strict=True)])  # [S, T]
    if smooth:
        values = np.stack([moving_average(row, SMOOTHED) for row in values])
    x = np.mean([getattr(curve, axis)[there] for curve, there in zip(curves, rows, strict=True)], axis=0)
    return x, values.min(0), values.mean(0), values.max(0)
