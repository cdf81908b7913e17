"""Imports go one way, as docs/architecture.md says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# room -> what it may import of the project besides itself
MAY_IMPORT = {
    "kernels": (),
    "attnlab/attention": ("kernels",),
    "attnlab/models": ("attnlab.attention", "kernels"),
    "attnlab/data": (),
    "attnlab/rl": ("attnlab.models", "attnlab.data", "kernels"),
    "attnlab/objectives": ("attnlab.rl", "attnlab.models", "attnlab.attention", "kernels"),
    "attnlab/training": ("attnlab.objectives", "attnlab.data.hosts"),
    "attnlab/evaluation": (
        "attnlab.config",
        "attnlab.data",
        "attnlab.models",
        "attnlab.objectives",
        "attnlab.rl",
        "attnlab.training",
    ),
    "attnlab/tasks": (
        "attnlab.config",
        "attnlab.data",
        "attnlab.evaluation",
        "attnlab.experiment",  # within one function, to open the run a task begins from
        "attnlab.models",
        "attnlab.objectives",
        "attnlab.rl",
        "attnlab.training",
    ),
    "attnlab/reproduce": ("attnlab",),  # nothing imports it
}


def imported(path: Path) -> set[str]:
    """Modules of the project that a file imports, wherever in the file; `from a import b` counts as a."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name for name in found if name.split(".")[0] in ("attnlab", "kernels")}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_downwards_only(room):
    allowed = (room.replace("/", "."), *MAY_IMPORT[room])
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            assert any(name == module or name.startswith(f"{module}.") for module in allowed), (
                f"{path}: {name}"
            )


def test_nothing_imports_the_experiments():
    for path in (ROOT / "attnlab").rglob("*.py"):
        if "reproduce" not in path.parts:
            assert not any(name.startswith("attnlab.reproduce") for name in imported(path)), path


def test_every_room_is_listed():
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "attnlab").glob("*/__init__.py")}
    assert rooms | {"kernels"} <= MAY_IMPORT.keys()
