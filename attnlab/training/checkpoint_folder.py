"""The folder that holds a run's checkpoints: names of steps, half-done ones, and which steps stay.

`00000500` is a committed step. `.orbax-checkpoint-tmp` ends the name of one that orbax has not committed,
`.replaced` that of a damaged step which waits for its successor, `.removed` that of one being deleted.
Renaming first and deleting then means that half a deletion never looks like a step.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping

from etils import epath

from attnlab.training import manifest

_STEP = re.compile(r"\d{8,}")
_UNFINISHED = ".orbax-checkpoint-tmp"
_REPLACED = ".replaced"
_REMOVED = ".removed"


class CheckpointFolder:
    """Reads and renames; nothing here is collective, and only process 0 may change anything."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = epath.Path(directory).absolute()

    def path(self, step: int) -> epath.Path:
        """Where the step is or will be."""
        return self.directory / f"{step:08d}"

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(int(name) for name in self._names() if _STEP.fullmatch(name))

    def unfinished(self) -> list[str]:
        """Names of folders that a killed save left behind."""
        return self._ending(_UNFINISHED, _REPLACED)

    def has_replaced(self) -> bool:
        """Whether a step was set aside and its successor never came."""
        return any(not self._original(name).exists() for name in self._ending(_REPLACED))

    def metrics(self, steps: list[int], name: str) -> dict[int, float | None]:
        """step -> the value of this metric in its manifest; None if it was not measured."""
        return {step: _metric(self.path(step), name) for step in steps}

    def prepare(self) -> None:
        """Creates the folder and drops what killed saves left; a replaced step without successor goes back."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in self._ending(_UNFINISHED, _REPLACED, _REMOVED):
            if name.endswith(_REPLACED) and not self._original(name).exists():
                (self.directory / name).rename(self._original(name))
            else:
                self._remove(name)

    def set_aside(self, step: int) -> None:
        """Frees the name of a step that is about to be written again."""
        if self.path(step).exists():
            self.path(step).rename(self.directory / f"{step:08d}{_REPLACED}")

    def drop_replaced(self, step: int) -> None:
        """Deletes what `set_aside` kept, now that its successor is committed."""
        self._remove(f"{step:08d}{_REPLACED}")

    def undo(self, step: int) -> None:
        """After a failed save: gives the space back and puts the folder that was set aside where it was."""
        self._remove(f"{step:08d}{_UNFINISHED}")
        replaced = self.directory / f"{step:08d}{_REPLACED}"
        if replaced.exists() and not self.path(step).exists():
            replaced.rename(self.path(step))

    def remove(self, step: int) -> None:
        """Deletes a step."""
        self._remove(f"{step:08d}")

    def _names(self) -> Iterator[str]:
        return (path.name for path in self.directory.iterdir()) if self.directory.exists() else iter(())

    def _ending(self, *endings: str) -> list[str]:
        return sorted(name for name in self._names() if name.endswith(endings))

    def _original(self, name: str) -> epath.Path:
        return self.directory / name.removesuffix(_REPLACED)

    def _remove(self, name: str) -> None:
        path = self.directory / name
        if path.exists():
            path.replace(removed := self.directory / f"{name.removesuffix(_REMOVED)}{_REMOVED}")
            removed.rmtree()


def steps_to_keep(metrics: Mapping[int, float | None], keep_last: int, keep_best: int) -> set[int]:
    """The newest `keep_last` steps and the `keep_best` lowest of step -> metric (None = not measured)."""
    return {*sorted(metrics)[-keep_last:], *ranking(metrics)[:keep_best]}


def ranking(metrics: Mapping[int, float | None]) -> list[int]:
    """Steps from best to worst, of two equals the earlier first; unmeasured and NaN ones are left out."""
    measured = {step: value for step, value in metrics.items() if value is not None and not math.isnan(value)}
    return sorted(measured, key=lambda step: (measured[step], step))


def _metric(path: epath.Path, name: str) -> float | None:
    try:
        content = manifest.read(path)
    except manifest.ManifestError:
        return None
    return content["metrics"].get(name) if content else None
