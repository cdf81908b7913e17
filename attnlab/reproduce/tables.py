"""The numbers of all runs as CSV, one row a run, and as Markdown, mean +- standard deviation over the seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np

from attnlab.reproduce.claims import Finding
from attnlab.reproduce.histories import HELD_OUT, LAST, TRAINING, History, numbers

HEADINGS = {
    "reward": "reward",
    "entropy": "entropy",
    "ess": "ess",
    "zero_std": "zero-std groups",
    "accuracy": "greedy",
    "mean_at_8": "mean@8",
    "pass_at_8": "pass@8",
}


def as_csv(runs: Mapping[str, Sequence[History]]) -> str:
    """A row a run: method, seed, steps, tokens and the numbers of its end."""
    text = io.StringIO()
    names = [*TRAINING, *HELD_OUT]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "steps", "tokens", *names])
    for method, histories in runs.items():
        for history in histories:
            found, tokens = numbers(history), int(history.curves["reward"].tokens[-1])
            values = [f"{found[name]:.4f}" for name in names]
            writer.writerow([method, history.seed, history.steps, tokens, *values])
    return text.getvalue()


def as_markdown(
    runs: Mapping[str, Sequence[History]], start: Mapping[str, float], problems: Sequence[Finding]
) -> str:
    """A row a method, the policy they began from first; then what is claimed, and whether it shows."""
    heading = ["run", "seeds", "step", *HEADINGS.values()]
    lines = [_row(heading), _row(["---"] * len(heading))]
    first = {"entropy": start["entropy"]} | {name: start[name] for name in HELD_OUT}
    lines.append(_row(["start", "", "0", *(f"{first[n]:.3f}" if n in first else "" for n in HEADINGS)]))
    for method, histories in runs.items():
        found = [numbers(history) for history in histories]
        cells = [_cell([each[name] for each in found]) for name in HEADINGS]
        lines.append(_row([method, str(len(found)), str(histories[0].steps), *cells]))
    lines += [
        "",
        f"Reward, entropy, ess and zero-std groups: means over the last {LAST} steps of training, of the",
    ]
    lines += ["rollouts; the rest held out. Mean +- standard deviation over the seeds, each in brackets.", ""]
    lines += [f"- {'**gate** ' if finding.claim.gate else ''}{finding.sentence}" for finding in problems]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(values: Sequence[float]) -> str:
    """mean +- sd (each); the deviation has no meaning for one seed."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} +- {np.std(values, ddof=1):.3f} ({' '.join(f'{value:.3f}' for value in values)})"
