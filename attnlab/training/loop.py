"""The training loop: restore, step, measure, save, and stop well. Task-agnostic and mixer-agnostic.

Order within a step: let the task make its updates, dispatch each, read the metrics of the step before (so that reading
never holds up the device), evaluate, save. The batch cursor and the task's memory are saved with the weights, so a
resumed run sees the batches an unbroken run would have seen.

Letters: B rows of the global batch.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.data.hosts import local_rows, process_rows, to_global
from attnlab.training import multihost
from attnlab.training.checkpoints import Checkpoints
from attnlab.training.config import TrainingConfig
from attnlab.training.feed import Feed
from attnlab.training.files import CHECKPOINTS, LOSS_PLOT
from attnlab.training.metrics import MetricsWriter
from attnlab.training.optimizer import make_optimizer
from attnlab.training.plots import plot_curves
from attnlab.training.progress import Progress
from attnlab.training.schedules import make_schedule
from attnlab.training.sharding import BATCH, describe, make_mesh, tree_shardings
from attnlab.training.signals import StopRequest
from attnlab.training.state import TrainState, init_state, train_step
from attnlab.training.task import Done, Task, Updated
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
    state = _with_places(shapes, mesh)
    cursor = jax.ShapeDtypeStruct(
        (task.batch_size, task.cursor_width), jnp.int32, sharding=_cursor_sharding(mesh)
    )
    whole = NamedSharding(mesh, P())
    clock = {name: jax.ShapeDtypeStruct((), jnp.float32, sharding=whole) for name in Clock().state()}
    memory = _with_places(jax.eval_shape(task.init_memory, shapes.params), mesh)
    saved = {"state": state, "cursor": cursor, "clock": clock}
    return saved | {"memory": memory} if jax.tree.leaves(memory) else saved


def _with_places(shapes: Any, mesh: Mesh) -> Any:
    """Shapes with the sharding of each."""
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
        shapes,
        tree_shardings(shapes, mesh),
    )


class _Run:
    """One process's part of a run: what changes from step to step."""

    writer: MetricsWriter

    def __init__(self, config: TrainingConfig, task: Task, workdir: Path, mesh: Mesh, saved: Checkpoints):
        self.config, self.task, self.workdir, self.mesh, self.saved = config, task, workdir, mesh, saved
        self.abstract = _abstract(config, task, mesh)
        self.compiled = None  # the update, once a batch has shown its shapes
        self.rows = process_rows(_cursor_sharding(mesh), (task.batch_size, task.cursor_width))
        restored = saved.restore_latest(self.abstract)
        self.step, values = restored if restored else (0, None)
        self.state: TrainState = values["state"] if values else self._fresh_state()
        self.memory = values.get("memory", {}) if values else self._fresh_memory()
        cursor = local_rows(values["cursor"], self.rows) if values else None
        self.clock = Clock.from_state(
            {k: float(v) for k, v in values["clock"].items()} if values else Clock().state()
        )
        batches = task.batches(self.rows, cursor)
        self.feed = Feed(batches, self.rows, cursor, mesh, task.batch_size, self.clock)
        self.measured: dict[str, float] = {}  # the newest evaluation
        self.measured_at = -1
        self.skipped = 0
        flops = 3 * task.objective.forward_flops_per_token()  # the backward pass costs two forward passes
        peak = peak_flops(jax.devices()[0], config.peak_flops or None)
        self.utilisation = lambda rate: model_flops_utilisation(flops * rate, peak, mesh.size)

    def _fresh_state(self) -> TrainState:
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract["state"])
        state = jax.jit(_initializer(self.config, self.task), out_shardings=shardings)()
        params = self.task.initial_params(self.mesh)
        return state if params is None else state.replace(params=params)

    def _fresh_memory(self) -> Any:
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract.get("memory", {}))
        return jax.jit(self.task.init_memory, out_shardings=shardings)(self.state.params)

    def loop(self, stop: StopRequest) -> Summary:
        steps = self.config.steps
        progress = Progress(steps, start=self.step)
        progress.note(describe(self.abstract["state"].params, self.mesh))
        pending: tuple[int, list, Done] | None = None
        self.clock.start()
        while self.step < steps:
            scalars, done = self._advance()
            self.memory = done.memory
            self.step += 1
            self._report(pending, progress)
            pending = (self.step, scalars, done)
            reason = self._stop_reason(stop)
            last = self.step == steps or reason is not None
            due = last or self._due(self.config.eval_every) or self._due(self.config.checkpoint.every)
            if due or done.waited:
                self._report(pending, progress)
                pending = None
            if due:
                with self.clock.paused():
                    self._evaluate_and_save(last, reason)
            if reason:
                progress.close()
                return Summary(self.step, reason, self.measured, [])
        progress.close()
        return self._finish()

    def _advance(self) -> tuple[list[dict[str, jax.Array]], Done]:
        """One step: every update the task makes; (their scalars, what the step leaves)."""
        updates = self.task.updates(self.state.params, self.memory, self.feed, self.step)
        scalars: list[dict[str, jax.Array]] = []
        try:
            batch = next(updates)
            while True:
                self.state, given = self._update(batch)
                scalars.append(given)
                batch = updates.send(Updated(given, self.state.params))
        except StopIteration as end:
            return scalars, end.value

    def _update(self, batch: dict[str, jax.Array]):
        if self.compiled is None:
            with self.clock.paused():
                self.compiled = self._compile(batch)
        return self.compiled(self.state, batch)

    def _compile(self, batch: dict[str, jax.Array]):
        """The update, compiled for this state and for batches like this one."""
        step = functools.partial(
            train_step,
            objective=self.task.objective,
            optimizer=make_optimizer(self.config.optimizer),
            schedule=make_schedule(self.config.optimizer.schedule, self.config.steps),
            parts=self.config.accumulate,
            updates_per_step=self.task.updates_per_step,
        )
        places = jax.tree.map(lambda s: s.sharding, self.abstract["state"])
        jitted = jax.jit(
            step,
            in_shardings=(places, jax.tree.map(lambda x: x.sharding, batch)),
            out_shardings=(places, NamedSharding(self.mesh, P())),
            donate_argnums=0,
        )
        return jitted.lower(self.state, batch).compile()

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

    def _report(self, pending: tuple[int, list, Done] | None, progress: Progress) -> None:
        """Read a finished step's scalars, apply the policy on NaN, write metrics."""
        if pending is None:
            return
        step, given, done = pending
        scalars = combine(jax.device_get(given))
        scalars |= {name: float(value) for name, value in jax.device_get(done.metrics).items()}
        self.clock.tick(done.tokens)
        if step % self.config.log_every == 0 or step == self.config.steps or scalars["nonfinite"]:
            speed = self._speed(progress)
            self.writer.write(step, {f"train/{k}": v for k, v in (scalars | speed).items()})
        progress.update(step, **{name: scalars[name] for name in self.task.shown})
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
        cursor = to_global(self.feed.cursor, self.rows, _cursor_sharding(self.mesh), self.task.batch_size)
        saved = {"state": self.state, "cursor": cursor, "clock": clock}
        return saved | {"memory": self.memory} if jax.tree.leaves(self.memory) else saved

    def _finish(self) -> Summary:
        self.saved.wait()
        self.writer.flush()
        files = self.task.finish(self.state.params, self.mesh, self.workdir)
        if multihost.is_main():
            files = [plot_curves(self.workdir, self.task.shown), *files]
        return Summary(self.step, "complete", self.measured, files)


def combine(updates: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Scalars of a step's updates as one: their mean; `*_max` and `*_min` over them; the number of non-finite ones."""
    return {name: _combined(name, [float(given[name]) for given in updates]) for name in updates[0]}


def _combined(name: str, values: list[float]) -> float:
    if name == "nonfinite":
        return sum(values)
    if name.endswith(("_max", "_min")):
        return max(values) if name.endswith("_max") else min(values)
    return sum(values) / len(values)
