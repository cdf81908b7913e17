"""The training loop: restore, step, measure, save, and stop well. Task-agnostic and mixer-agnostic.

Order within a step: fetch the batch, dispatch the update, read the metrics of the step before (so that reading never
holds up the device), evaluate, save. The batch cursor is saved with the weights, so a resumed run sees the batches
an unbroken run would have seen.

Letters: B rows of the global batch.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.data.hosts import local_rows, process_rows, to_global
from attnlab.training import multihost
from attnlab.training.checkpoints import Checkpoints
from attnlab.training.config import TrainingConfig
from attnlab.training.files import CHECKPOINTS, LOSS_PLOT
from attnlab.training.metrics import MetricsWriter
from attnlab.training.optimizer import make_optimizer
from attnlab.training.plots import plot_loss
from attnlab.training.progress import Progress
from attnlab.training.schedules import make_schedule
from attnlab.training.sharding import BATCH, describe, make_mesh, tree_shardings
from attnlab.training.signals import StopRequest
from attnlab.training.state import TrainState, init_state, train_step
from attnlab.training.task import Task
from attnlab.training.throughput import Clock, model_flops_utilisation, peak_flops

STOP_CHECK_STEPS = 10  # with several hosts, how often they ask each other whether to stop


class NonFiniteError(RuntimeError):
    """Training met a NaN or infinity and the policy was to stop."""


@dataclass(frozen=True)
class Summary:
    """How a run ended: the step reached, why ("complete", "already complete" or a signal's name), what was written."""

    step: int
    reason: str
    metrics: dict[str, float]
    files: list[Path]

    def text(self, workdir: Path) -> str:
        """What to tell a person at the end of the run."""
        lines = [f"step {self.step}, {self.reason}; the run is in {workdir}"]
        for name, value in self.metrics.items():
            error = self.metrics.get(f"{name}_se")
            if error is not None:  # NaN where a single document was read
                lines.append(f"  {name} {value:.4f}" + (f" +- {error:.4f}" if math.isfinite(error) else ""))
        return "\n".join(lines + [f"  {path}" for path in self.files])


def train(config: TrainingConfig, task: Task, workdir: Path, devices=None) -> Summary:
    """Train `task` until config.steps on `devices` (default: all), going on from the newest checkpoint in `workdir`.

    Every process of a multi-host job calls it alike. Raises CheckpointError, StateMismatchError, NonFiniteError,
    MetricsError, or ValueError for a mesh or batch that does not fit; what was saved before stays intact.
    """
    mesh = make_mesh(config.mesh, devices)
    with (
        jax.set_mesh(mesh),
        StopRequest() as stop,
        Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as saved,
    ):
        run = _Run(config, task, workdir, mesh, saved)
        finished = multihost.broadcast((workdir / LOSS_PLOT).exists())  # or killed after its last checkpoint
        if run.step >= config.steps and finished:
            return Summary(run.step, "already complete", {}, [])
        with MetricsWriter(workdir, wandb=config.wandb or None, resume_step=run.step or None) as run.writer:
            return run.loop(stop)


def restore_state(
    config: TrainingConfig, task: Task, workdir: Path, mesh: Mesh, step: int | None = None
) -> tuple[int, dict[str, Any]] | None:
    """(step, {"state", "cursor", "clock"}) of the newest intact checkpoint or of `step`, laid out on `mesh`.

    For reading, not for going on: the cursor comes whole to every device, so the mesh need not divide the batch.
    """
    abstract = _abstract(config, task, mesh)
    abstract["cursor"] = abstract["cursor"].update(sharding=NamedSharding(mesh, P()))
    with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as saved:
        return saved.restore_latest(abstract) if step is None else (step, saved.restore(step, abstract))


def _initializer(config: TrainingConfig, task: Task):
    return functools.partial(init_state, task.objective, make_optimizer(config.optimizer), config.seed)


def _cursor_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH[0]))


def _abstract(config: TrainingConfig, task: Task, mesh: Mesh) -> dict[str, Any]:
    """Shapes and places of everything a checkpoint holds."""
    shapes = jax.eval_shape(_initializer(config, task))
    state = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
        shapes,
        tree_shardings(shapes, mesh),
    )
    cursor = jax.ShapeDtypeStruct(
        (task.batch_size, task.cursor_width), jnp.int32, sharding=_cursor_sharding(mesh)
    )
    whole = NamedSharding(mesh, P())
    clock = {name: jax.ShapeDtypeStruct((), jnp.float32, sharding=whole) for name in Clock().state()}
    return {"state": state, "cursor": cursor, "clock": clock}


class _Run:
    """One process's part of a run: what changes from step to step."""

    writer: MetricsWriter

    def __init__(self, config: TrainingConfig, task: Task, workdir: Path, mesh: Mesh, saved: Checkpoints):
        self.config, self.task, self.workdir, self.mesh, self.saved = config, task, workdir, mesh, saved
        self.abstract = _abstract(config, task, mesh)
        self.batch_sharding = NamedSharding(mesh, BATCH)
        self.rows = process_rows(_cursor_sharding(mesh), (task.batch_size, task.cursor_width))
        restored = saved.restore_latest(self.abstract)
        self.step, values = restored if restored else (0, None)
        self.state: TrainState = values["state"] if values else self._fresh_state()
        self.cursor = local_rows(values["cursor"], self.rows) if values else None
        self.clock = Clock.from_state(
            {k: float(v) for k, v in values["clock"].items()} if values else Clock().state()
        )
        self.measured: dict[str, float] = {}  # the newest evaluation
        self.measured_at = -1
        self.skipped = 0
        flops = 3 * task.objective.forward_flops_per_token()  # the backward pass costs two forward passes
        peak = peak_flops(jax.devices()[0], config.peak_flops or None)
        self.utilisation = lambda rate: model_flops_utilisation(flops * rate, peak, mesh.size)

    def _fresh_state(self) -> TrainState:
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract["state"])
        return jax.jit(_initializer(self.config, self.task), out_shardings=shardings)()

    def loop(self, stop: StopRequest) -> Summary:
        steps, batches = self.config.steps, self._batches()
        compiled = self._compile(first := next(batches))
        progress = Progress(steps, start=self.step)
        progress.note(describe(self.abstract["state"].params, self.mesh))
        pending: tuple[int, dict] | None = None
        self.clock.start()
        while self.step < steps:
            with self.clock.waiting():
                batch, self.cursor = first or next(batches)
                first = None
            self.state, scalars = compiled(self.state, batch)
            self.step += 1
            self._report(pending, progress)
            pending = (self.step, scalars)
            reason = self._stop_reason(stop)
            last = self.step == steps or reason is not None
            if last or self._due(self.config.eval_every) or self._due(self.config.checkpoint.every):
                self._report(pending, progress)
                pending = None
                with self.clock.paused():
                    self._evaluate_and_save(last, reason)
            if reason:
                progress.close()
                return Summary(self.step, reason, self.measured, [])
        progress.close()
        return self._finish()

    def _batches(self) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
        """Global batches with this process's cursor rows after them."""
        for batch, cursor in self.task.batches(self.rows, self.cursor):
            yield to_global(batch, self.rows, self.batch_sharding, self.task.batch_size), cursor

    def _compile(self, first):
        """The step, compiled for this state and batch before the clock starts."""
        step = functools.partial(
            train_step,
            objective=self.task.objective,
            optimizer=make_optimizer(self.config.optimizer),
            schedule=make_schedule(self.config.optimizer.schedule, self.config.steps),
            parts=self.config.accumulate,
        )
        places = jax.tree.map(lambda s: s.sharding, self.abstract["state"])
        jitted = jax.jit(
            step,
            in_shardings=(places, self.batch_sharding),
            out_shardings=(places, NamedSharding(self.mesh, P())),
            donate_argnums=0,
        )
        return jitted.lower(self.state, first[0]).compile()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _stop_reason(self, stop: StopRequest) -> str | None:
        if jax.process_count() == 1:
            return stop.received
        if self.step % STOP_CHECK_STEPS:
            return None
        return (
            (stop.received or "a signal to another host")
            if multihost.all_agree_stop(bool(stop.received))
            else None
        )

    def _report(self, pending: tuple[int, dict] | None, progress: Progress) -> None:
        """Read a finished step's scalars, apply the policy on NaN, write metrics."""
        if pending is None:
            return
        step, scalars = pending[0], {name: float(value) for name, value in jax.device_get(pending[1]).items()}
        self.clock.tick(self.task.tokens_per_batch)
        if step % self.config.log_every == 0 or step == self.config.steps or scalars["nonfinite"]:
            speed = self._speed(progress)
            self.writer.write(step, {f"train/{k}": v for k, v in (scalars | speed).items()})
        progress.update(step, loss=scalars["loss"])
        self._check_finite(step, scalars)

    def _speed(self, progress: Progress) -> dict[str, float]:
        """Throughput since the last line of metrics."""
        speed = {"tokens": float(self.clock.tokens), "seconds": self.clock.seconds}
        rates = self.clock.rates()
        if rates is None:
            return speed
        speed |= {
            "tokens_per_second": rates.tokens_per_second,
            "step_seconds": rates.step_seconds,
            "data_wait_fraction": rates.data_wait_fraction,
        }
        mfu = self.utilisation(rates.tokens_per_second)
        progress.rates(rates.tokens_per_second, mfu)
        return speed if mfu is None else speed | {"mfu": mfu}

    def _check_finite(self, step: int, scalars: dict[str, float]) -> None:
        self.skipped = self.skipped + 1 if scalars["nonfinite"] else 0
        if not self.skipped:
            return
        if self.config.nonfinite == "stop" or self.skipped > self.config.max_skipped:
            self.saved.wait()  # so that the message can say what is on disk
            raise NonFiniteError(
                f"step {step} has loss {scalars['loss']} and gradient norm {scalars['grad_norm']}, {self.skipped} "
                f"such step(s) in a row; the parameters were not updated and checkpoints up to step "
                f"{max(self.saved.steps(), default=0)} are intact: lower the learning rate, or set "
                "training.nonfinite='skip' or a larger training.max_skipped"
            )

    def _evaluate_and_save(self, last: bool, reason: str | None) -> None:
        """Evaluate when due (not on the way out after a signal), then save when due or last."""
        done = self.step == self.config.steps
        if done or (not reason and self._due(self.config.eval_every)):
            values = self.task.evaluate(self.state.params, self.mesh)
            self.measured = {f"validation/{name}": value for name, value in values.items()}
            self.measured_at = self.step
            self.writer.write(self.step, self.measured | {"validation/tokens": float(self.clock.tokens)})
        self.writer.flush()  # a checkpoint must not be there before the metrics up to its step are
        metrics = self.measured if self.measured_at == self.step else None
        self.saved.save(self.step, self._checkpoint(), metrics=metrics, force=last)

    def _checkpoint(self) -> dict[str, Any]:
        whole = NamedSharding(self.mesh, P())
        clock = {
            name: jax.device_put(jnp.float32(value), whole) for name, value in self.clock.state().items()
        }
        cursor = to_global(self.cursor, self.rows, _cursor_sharding(self.mesh), self.task.batch_size)
        return {"state": self.state, "cursor": cursor, "clock": clock}

    def _finish(self) -> Summary:
        self.saved.wait()
        self.writer.flush()
        files = self.task.finish(self.state.params, self.mesh, self.workdir)
        if multihost.is_main():
            files = [plot_loss(self.workdir), *files]
        return Summary(self.step, "complete", self.measured, files)
