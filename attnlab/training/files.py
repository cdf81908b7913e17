"""Names of the files in a run's folder, and how small ones are written."""

import os
from pathlib import Path

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
LOSS_PLOT = "loss.png"  # written last


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader or a crash never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
