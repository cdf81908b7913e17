"""Training runs of config files, several at a time, each in a process that has one core; finished ones are skipped.

A run is what `python train.py --config=FILE:VARIANT --config.FIELD=VALUE .. --workdir=WORKDIR` trains, and after it
`eval.py --eval=problems` with more problems than during training.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlab.config import Experiment, check_field, from_config_dict, read_experiment
from attnlab.training.files import CONFIG

CONFIGS = Path(__file__).parents[2] / "configs"
COMPLETE = ("complete", "already complete")
ONE_CORE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # most programs are the same in every run
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A config file of configs/ by name, its variant, changed fields by path, and the problems solved at the end."""

    config: str
    variant: str
    workdir: Path
    changes: tuple[tuple[str, Any], ...] = ()
    final_problems: int = 512

    def experiment(self) -> Experiment:
        path = CONFIGS / f"{self.config}.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        values = module.get_config(self.variant)
        for name, value in self.changes:
            check_field(name)
            part, _, field = name.rpartition(".")
            target = values
            for key in part.split(".") if part else ():
                target = target[key]
            target[field] = value
        return from_config_dict(values)

    def command(self) -> str:
        """What a person would type for the training."""
        variant = f":{self.variant}" if self.variant else ""
        words = ["python", "train.py", f"--config=configs/{self.config}.py{variant}"]
        words += [f"--config.{name}={value}" for name, value in self.changes]
        return shlex.join([*words, f"--workdir={self.workdir}"])

    @property
    def answers(self) -> Path:
        """Where the final evaluation is kept."""
        return self.workdir / "eval" / "problems.json"

    def is_done(self) -> bool:
        """Whether this very run was trained and evaluated to its end."""
        if not (self.answers.exists() and (self.workdir / CONFIG).exists()):
            return False
        new, old = self.experiment(), read_experiment(self.workdir / CONFIG)
        kept = all(
            getattr(old, part) == getattr(new, part) for part in ("grpo", "training", "data", "init_from")
        )
        about = json.loads(self.answers.read_text())
        return kept and (about["step"], about["options"]["problems"]) == (
            new.training.steps,
            self.final_problems,
        )


def perform(run: Run) -> float:
    """Train and evaluate in this process; returns the CPU-seconds it took. RuntimeError if it was interrupted."""
    from attnlab.evaluation import run as evaluate
    from attnlab.evaluation import write
    from attnlab.evaluation.command import open_mesh
    from attnlab.experiment import open_task, prepare, restore_params
    from attnlab.training.loop import train

    began, experiment = time.process_time(), run.experiment()
    experiment.validate(1)
    run.workdir.mkdir(parents=True, exist_ok=True)
    with (run.workdir / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        task = open_task(experiment)
        prepare(task, run.workdir)
        summary = train(experiment.training, task, run.workdir)
        if summary.reason not in COMPLETE:
            raise RuntimeError(
                f"{run.workdir} was stopped at step {summary.step} by {summary.reason}; run it again"
            )
        mesh = open_mesh(experiment.training.mesh, experiment.data.batch_size)
        step, params = restore_params(run.workdir, task, mesh)
        options = dataclasses.replace(experiment.eval, problems=run.final_problems)
        write(evaluate("problems", task.context(params, mesh, step), options), run.workdir / "eval")
    return time.process_time() - began


def perform_all(runs: Sequence[Run], processes: int, compiled: Path) -> float:
    """Those of `runs` that are not done, so many at a time; returns CPU-seconds. Compiled programs go to a folder."""
    waiting = [run for run in runs if not run.is_done()]
    for run in runs:
        print(run.command() if run in waiting else f"done before: {run.workdir}", flush=True)
    if not waiting:
        return 0.0
    total, fresh = 0.0, multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(min(processes, len(waiting)), fresh)
    with _environment(ONE_CORE | {"JAX_COMPILATION_CACHE_DIR": str(compiled.absolute())}), pool:
        futures = {pool.submit(perform, run): run for run in waiting}
        try:
            for future in concurrent.futures.as_completed(futures):
                seconds = future.result()
                total += seconds
                print(f"{futures[future].workdir}: {seconds:.0f} CPU-seconds", flush=True)
        except BaseException:  # the runs under way end, the others do not begin
            pool.shutdown(cancel_futures=True)
            raise
    return total


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Of processes that start meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
