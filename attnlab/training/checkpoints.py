"""Checkpoints of a run: the whole training state, one folder per step, saved in the background.

A run's folder holds `00000500/`, `00001000/`, ... . Orbax writes a step under a temporary name and renames it
when complete; then `manifest.json` (sizes, checksums, metrics) is added, and old steps are removed. Restoring
starts from the newest step, says aloud what is wrong with a damaged one, and takes the one before.
States are pytrees of `jax.Array`; random keys are raw uint32 data (`jax.random.key_data`), not typed keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath

from attnlab.training import manifest, multihost
from attnlab.training.checkpoint_folder import CheckpointFolder, ranking, steps_to_keep
from attnlab.training.signature import check_abstract, check_saveable, first_difference, signature

PyTree = Any


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be restored."""


class StateMismatchError(ValueError):
    """The checkpoint is intact but belongs to another state: other names, shapes or dtypes."""


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over; the text says which one and why."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, how to check."""

    every: int = 500  # steps between saves
    keep_last: int = 3  # newest steps kept
    keep_best: int = 1  # steps with the lowest metric kept beside them; 0 = none
    best_metric: str = "validation/loss"  # name in the `metrics` given to `save`; lower is better
    asynchronous: bool = True  # False: `save` returns when the files are there
    verify: Literal["hash", "size"] = "hash"  # "size" does not read the files back (very large runs)

    def validate(self) -> None:
        """Raises ValueError with the offending value."""
        if self.every < 1:
            raise ValueError(f"checkpoint every={self.every} must be at least 1 step.")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint keep_last={self.keep_last} must be at least 1, to resume from.")
        if self.keep_best < 0:
            raise ValueError(f"checkpoint keep_best={self.keep_best} must be 0 (off) or more.")
        if self.verify not in ("hash", "size"):
            raise ValueError(f"checkpoint verify={self.verify!r} must be 'hash' or 'size'.")


class Checkpoints:
    """The checkpoints below one folder; every process of the job makes one and calls it alike.

    The folder must be on a file system that all hosts share. Nothing is created before the first save, so
    an evaluator may open the folder of a running trainer.
    """

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig | None = None):
        self._config = config or CheckpointConfig()
        self._config.validate()
        self._folder = CheckpointFolder(directory)
        self._handler = ocp.StandardCheckpointHandler()
        self._writer: ocp.AsyncCheckpointer | None = None  # made by the first save
        self._background: _Background | None = None
        self._saved: set[int] = set()  # written (or restored) by this object: known to be good
        self._damaged: dict[int, str] = {}  # found at restore: step -> reason

    def save(
        self, step: int, state: PyTree, *, metrics: Mapping[str, float] | None = None, force: bool = False
    ) -> bool:
        """Saves the state of this step if `step` is a multiple of `every`, or always with `force`.

        Returns whether a save was started; a step that is already there intact is not written again, a
        damaged one is replaced. The arrays are copied before this returns, so they may be donated.

        Raises CheckpointError if this save, or the one before that ran in the background, cannot be
        written; ValueError if a leaf is not a `jax.Array` or is a typed random key.
        """
        if not (force or step % self._config.every == 0):
            return False
        check_saveable(state)
        self.wait()  # the previous save, and its errors
        if multihost.broadcast(self._is_intact(step)):
            return False
        try:
            self._start(step, state, dict(metrics or {}))
        except Exception as error:
            self._clean_up(step)
            raise self._write_error(step, error) from error
        if not self._config.asynchronous:
            self.wait()
        return True

    def restore_latest(self, abstract_state: PyTree) -> tuple[int, PyTree] | None:
        """The newest intact checkpoint as (step, state), or None if the folder holds no checkpoint at all.

        `abstract_state` has a `jax.ShapeDtypeStruct` with a sharding at each leaf; mesh, device and process
        counts may differ from those at saving. Damaged and unfinished steps are skipped with a warning.

        Raises CheckpointError if there are checkpoints and none can be restored; StateMismatchError if an
        intact one has other names, shapes or dtypes (that is no damage, so nothing is skipped).
        """
        check_abstract(abstract_state)
        self.wait()
        folder = self._folder
        steps, unfinished, replaced = multihost.broadcast(
            [folder.steps(), folder.unfinished(), folder.has_replaced()]
        )
        for name in unfinished:
            _warn(f"{folder.directory / name} is unfinished and was skipped.")
        for step in reversed(steps):
            state, reason = self._attempt(step, abstract_state)
            if reason is None:
                return step, state
            _warn(f"Checkpoint {self._folder.path(step)} is damaged and was skipped: {reason}.")
        if not steps and not replaced:
            return None
        raise CheckpointError(
            f"None of the checkpoints in {self._folder.directory} can be restored ({self._damage_list()}); "
            "move the folder away to start from scratch."
        )

    def restore(self, step: int, abstract_state: PyTree) -> PyTree:
        """The state of exactly this step, laid out as `abstract_state` says (see `restore_latest`)."""
        check_abstract(abstract_state)
        self.wait()
        steps = multihost.broadcast(self.steps())
        if step not in steps:
            raise CheckpointError(f"{self._folder.directory} has no checkpoint of step {step}, only {steps}.")
        state, reason = self._attempt(step, abstract_state)
        if reason is not None:
            raise CheckpointError(f"Checkpoint {self._folder.path(step)} is damaged: {reason}.")
        return state

    def steps(self) -> list[int]:
        """Every committed step on disk, ascending; whether they are intact is only known by restoring."""
        return self._folder.steps()

    def best_step(self) -> int | None:
        """The committed step with the lowest `best_metric`, or None if none has one."""
        ranked = ranking(self._folder.metrics(self.steps(), self._config.best_metric))
        return ranked[0] if ranked else None

    def wait(self) -> None:
        """Returns when the save in progress is on disk; raises CheckpointError if it failed."""
        if self._background is None:
            return
        background, self._background = self._background, None
        background.join()
        if background.error is not None:
            self._clean_up(background.step)
            raise self._write_error(background.step, background.error) from background.error
        self._saved.add(background.step)
        self._damaged.pop(background.step, None)

    def close(self) -> None:
        """Waits for the save in progress and frees the writer; raises CheckpointError if it failed."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            _warn(str(failure))  # the body's own error matters more

    # --- saving ------------------------------------------------------------------------------------------

    def _start(self, step: int, state: PyTree, metrics: dict[str, float]) -> None:
        if self._writer is None:
            if multihost.is_main():
                self._folder.prepare()
            self._writer = ocp.AsyncCheckpointer(self._handler)
        if multihost.is_main():
            self._folder.set_aside(step)
        multihost.barrier(f"checkpoint {step}: its name is free")
        self._writer.save(self._folder.path(step), args=ocp.args.StandardSave(state))
        self._background = _Background(step, lambda: self._finish(step, metrics))
        self._background.start()

    def _finish(self, step: int, metrics: dict[str, float]) -> None:
        """Runs in the background; must not talk to other processes (orbax does that while it commits)."""
        self._writer.wait_until_finished()
        if not multihost.is_main():
            return
        config, folder = self._config, self._folder
        manifest.write(folder.path(step), step=step, metrics=metrics, verify=config.verify)
        folder.drop_replaced(step)
        intact = [s for s in folder.steps() if s not in self._damaged or s == step]
        kept = steps_to_keep(folder.metrics(intact, config.best_metric), config.keep_last, config.keep_best)
        outdated = [s for s in self._damaged if s < step]  # damaged ones count for nothing
        for old in {*intact, *outdated} - kept:
            folder.remove(old)

    def _clean_up(self, step: int) -> None:
        if multihost.is_main():
            with contextlib.suppress(OSError):  # the disk may refuse this too; the first error is told
                self._folder.undo(step)

    def _write_error(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint of step {step} could not be written to {self._folder.directory} ({_brief(error)}); "
            "earlier checkpoints are untouched, so make room or repair the disk and resume."
        )

    # --- restoring ---------------------------------------------------------------------------------------

    def _attempt(self, step: int, abstract_state: PyTree) -> tuple[PyTree | None, str | None]:
        """(state, None), or (None, what is wrong with the folder)."""
        path = self._folder.path(step)
        reason = manifest.find_damage(path, self._config.verify) if multihost.is_main() else None
        reason, state = multihost.broadcast(reason), None
        if reason is None:
            state, reason = self._read(path, abstract_state)
            if multihost.any_process(reason is not None) and reason is None:
                state, reason = None, "another process could not read it"
        if reason is None:
            self._saved.add(step)
        else:
            self._damaged[step] = reason
        return state, reason

    def _read(self, path: epath.Path, abstract_state: PyTree) -> tuple[PyTree | None, str | None]:
        try:
            found = signature(self._handler.metadata(path).tree)
        except Exception as error:  # orbax lets the errors of json, zarr and its own classes through
            return None, f"its description is unreadable ({_brief(error)})"
        if difference := first_difference(found, signature(abstract_state)):
            raise StateMismatchError(f"Checkpoint {path} is of another model or optimiser: {difference}.")
        try:
            state = self._handler.restore(path, args=ocp.args.StandardRestore(abstract_state))
            return jax.block_until_ready(state), None
        except MemoryError:
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED: Out of memory" in str(error):  # of the device
                raise
            return None, f"its arrays are unreadable ({_brief(error)})"

    def _is_intact(self, step: int) -> bool:
        """Whether the step is there and good as far as process 0 can tell; without a manifest it cannot."""
        if not multihost.is_main() or step in self._damaged or step not in self.steps():
            return False
        if step in self._saved:
            return True
        path = self._folder.path(step)
        return (path / manifest.NAME).exists() and manifest.find_damage(path, self._config.verify) is None

    def _damage_list(self) -> str:
        reasons = [f"step {step}: {reason}" for step, reason in sorted(self._damaged.items())]
        return "; ".join(reasons) or "unfinished"


class _Background(threading.Thread):
    """One save being finished; the error, if any, is kept for the thread that waits."""

    def __init__(self, step: int, work: Callable[[], None]):
        super().__init__(name=f"checkpoint {step}")
        self.step = step
        self.error: Exception | None = None
        self._work = work

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self.error = error


def _brief(error: Exception) -> str:
    """The innermost cause in the first line of an error.

    The file library nests causes as `Error writing "a": Failed writing "b": No space left [settings ...]`.
    """
    line = next(iter(str(error).strip().splitlines()), "no message")
    cause = re.split(r" \[(?:tensorstore_spec|os_error_code|source locations)", line)[0].split('": ')[-1]
    return f"{type(error).__name__}: {cause[:300]}"


def _warn(sentence: str) -> None:
    if multihost.is_main():
        warnings.warn(sentence, CheckpointWarning, stacklevel=3)
