"""The run's metrics: one `write(step, scalars)` that reaches every sink without holding up the training step.

Names are "group/name", for example "train/loss", "validation/loss" and "train/tokens" (tokens seen so far).
"""

from __future__ import annotations

import os
import pathlib
import queue
import threading
import warnings
from collections.abc import Mapping

from attnlab.training import multihost, sinks

_QUEUE = 1024  # writes waiting for the disk before `write` waits too


class MetricsError(RuntimeError):
    """Metrics could not be written."""


class MetricsWriter:
    """Writes metrics.jsonl, one CSV per group, TensorBoard events and, if asked, Weights & Biases.

    Every process makes one; only process 0 writes. `resume_step` is the step the run continues from: what an
    earlier run recorded after it is dropped. None begins a new record, and an earlier one in the folder is
    kept beside it as `metrics.jsonl.previous`.

    Raises ValueError if `wandb` names a project and wandb is not installed, or metrics.jsonl is not readable.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, wandb: str | None = None, resume_step: int | None = None
    ):
        self._workdir = pathlib.Path(workdir)
        self._error: Exception | None = None
        self._queue: queue.Queue = queue.Queue(_QUEUE)
        self._thread: threading.Thread | None = None
        self._is_main = multihost.is_main()
        if self._is_main:
            self._sinks = self._open(wandb, resume_step)
            self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
            self._thread.start()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records the scalars of one step; returns before they are on disk.

        Raises MetricsError if an earlier write failed or this is closed, ValueError for the name "step".
        """
        if reserved := [name for name in scalars if name.rpartition("/")[2] == "step"]:
            raise ValueError(f"The metric name {reserved[0]!r} is taken by the step itself: choose another.")
        if not self._is_main:
            return
        if self._thread is None:
            raise MetricsError(f"The metrics writer of {self._workdir} is closed.")
        self._raise_error()
        self._queue.put((int(step), {name: float(value) for name, value in scalars.items()}))

    def flush(self) -> None:
        """Returns when everything written so far is in the files; raises MetricsError if that failed."""
        self._queue.join()
        self._raise_error()

    def close(self) -> None:
        """Writes what is waiting and closes the files; raises MetricsError if something failed."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join()
        self._thread = None
        self._raise_error()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except MetricsError as failure:
            if error is None:
                raise
            warnings.warn(str(failure), stacklevel=2)  # the body's own error matters more

    def _open(self, wandb: str | None, resume_step: int | None) -> list[sinks.Sink]:
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / sinks.JSONL
        sinks.CsvTables.remove(self._workdir, sinks.read_jsonl(path))
        if resume_step is None and path.exists():
            os.replace(path, path.with_name(f"{path.name}.previous"))
        last_step = -1 if resume_step is None else resume_step
        kept = sinks.rewind_jsonl(path, last_step)
        opened: list[sinks.Sink] = [sinks.WeightsAndBiases(self._workdir, wandb)] if wandb else []
        opened.append(sinks.JsonLines(path))
        opened.append(sinks.CsvTables(self._workdir, kept))
        opened.append(sinks.TensorBoard(self._workdir / "tensorboard", purge_step=last_step + 1))
        return opened

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None:
                    for sink in self._sinks:
                        sink.write(*item)
            except Exception as error:
                self._error = error
            finally:
                self._queue.task_done()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                self._error = self._error or error
        self._queue.task_done()

    def _raise_error(self) -> None:
        if self._error is not None:
            sentence = f"Metrics could not be written to {self._workdir}: {self._error}"
            raise MetricsError(sentence) from self._error
