"""Every notebook runs from top to bottom, in a kernel of its own."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def outputs(notebook, kind: str) -> list:
    return [
        o["data"][kind]
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        if kind in o.get("data", {})
    ]


@pytest.mark.processes
@pytest.mark.thorough
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_draws(path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert outputs(notebook, "image/png"), "no figure was drawn"


def test_all_notebooks_are_found():
    assert [path.name for path in NOTEBOOKS] == ["01_attention_tour.ipynb"]
