"""Results on disk: <name>.json (scalars, and of what), .csv (the table), .png (the figure), .txt (the text)."""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg

from attnlab.evaluation.evaluator import Result
from attnlab.training import multihost
from attnlab.training.files import write_atomically


def write(result: Result, folder: Path) -> list[Path]:
    """Write what a result has and return the paths; process 0 writes, the others do nothing.

    Every file appears whole or not at all; files of an earlier evaluation of that name are replaced. JSON has no NaN
    or infinity, so these become null.
    """
    if not multihost.is_main():
        return []
    stem = folder / result.name
    texts = {"json": _json(result)}
    if result.rows:
        texts["csv"] = _csv(result.rows)
    if result.text:
        texts["txt"] = result.text
    for ending, text in texts.items():
        write_atomically(stem.with_suffix(f".{ending}"), text)
    paths = [stem.with_suffix(f".{ending}") for ending in texts]
    return paths if result.figure is None else [*paths, _draw(result, stem.with_suffix(".png"))]


def _json(result: Result) -> str:
    scalars = {name: value if math.isfinite(value) else None for name, value in result.scalars.items()}
    content = {"evaluator": result.name, **result.about, "scalars": scalars}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _draw(result: Result, path: Path) -> Path:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    FigureCanvasAgg(result.figure()).print_png(
        partial
    )  # this canvas: no display, nor the user's plotting state
    partial.replace(path)
    return path
