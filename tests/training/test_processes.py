"""train.py in processes of its own: killed, stopped, damaged or spread over hosts, it goes on as if nothing was."""

import contextlib
import csv
import dataclasses
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from attnlab.experiment import load_config, open_task, restore_params
from attnlab.training.sharding import MeshConfig, make_mesh
from attnlab.training.sinks import read_jsonl
from tests.programs import LIMIT, start, write_tiny_config
from tests.training.runs import losses, run
from tests.training.test_multihost import free_port

pytestmark = [pytest.mark.processes, pytest.mark.thorough]
STEPS = 24
TIMED = ("seconds", "second", "fraction")  # endings of the names of metrics that no two runs share


@pytest.fixture(scope="module")
def config(text_folder, tmp_path_factory) -> Path:
    return write_tiny_config(tmp_path_factory.mktemp("config"), text_folder)


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory) -> Path:
    """The folder of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("unbroken")
    finish(train(config, workdir))
    return workdir


def train(config: Path, workdir: Path, *arguments: str, devices: int = 1) -> subprocess.Popen:
    return start("train.py", f"--config={config}", f"--workdir={workdir}", *arguments, devices=devices)


def finish(*processes: subprocess.Popen) -> list[tuple[str, str]]:
    """(output, errors) of each process; all must end well."""
    with killed_in_the_end(*processes):
        said = [process.communicate(timeout=LIMIT) for process in processes]
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return said


@contextlib.contextmanager
def killed_in_the_end(*processes: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Look a thousand times a second, as long as all processes run."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + LIMIT, "it hangs"
        time.sleep(0.001)
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, ended[0].communicate()[1][-3000:]


def steps_of(workdir: Path) -> list[int]:
    """The steps whose training metrics are on disk, in order."""
    return [record["step"] for record in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in record]


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())


def is_saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def learnt(workdir: Path) -> list[dict[str, float]]:
    """All records of the metrics, without what depends on the speed of the machine."""
    return [
        {name: value for name, value in record.items() if not name.endswith(TIMED)}
        for record in read_jsonl(workdir / "metrics.jsonl")
    ]


def assert_same_record(workdir: Path, unbroken: Path) -> None:
    """The same losses to the bit, in metrics.jsonl and in the tables, each step once."""
    assert steps_of(workdir) == list(range(1, STEPS + 1))
    assert learnt(workdir) == learnt(unbroken)
    for name in ("train.csv", "validation.csv"):
        tables = []
        for folder in (workdir, unbroken):
            with (folder / name).open() as file:
                tables.append([(row["step"], row["loss"]) for row in csv.DictReader(file)])
        assert tables[0] == tables[1], name
    assert saved_steps(workdir) == saved_steps(unbroken)
    assert (workdir / "loss.png").exists()


def test_killed_at_any_moment_it_ends_as_if_it_never_was(config, unbroken, tmp_path):
    """Killed while a checkpoint is being written, at a random moment after going on, and while starting."""
    process = train(config, tmp_path)
    wait_until(lambda: len(saved_steps(tmp_path)) > 1 and is_saving(tmp_path), process)
    kill(process)
    reached = steps_of(tmp_path)[-1]
    assert 4 <= reached < STEPS, "it was to be killed on its way"

    process, chance = train(config, tmp_path), random.Random(0)
    wait_until(lambda: steps_of(tmp_path)[-1] != reached, process)  # the record was rewound, or grew
    time.sleep(chance.uniform(0, 0.3))
    kill(process)

    process = train(config, tmp_path)
    time.sleep(chance.uniform(1, 4))
    kill(process)

    finish(train(config, tmp_path))
    assert_same_record(tmp_path, unbroken)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


SLOW_DISK = """
import time
from attnlab.training import sinks

def write_slowly(sink, step, scalars, write=sinks.JsonLines.write):
    time.sleep(0.2)
    write(sink, step, scalars)

sinks.JsonLines.write = write_slowly
"""


def test_metrics_are_on_disk_before_the_checkpoint_that_counts_them(config, tmp_path):
    """Otherwise a run killed now would resume after steps whose metrics are lost."""
    slow = config.with_name("slow.py")
    slow.write_text(config.read_text() + SLOW_DISK)
    process = train(slow, tmp_path)
    with killed_in_the_end(process):
        wait_until(lambda: saved_steps(tmp_path) or is_saving(tmp_path), process)
        kill(process)
    assert steps_of(tmp_path)[:2] == [1, 2]


def test_sigterm_saves_the_step_it_is_at_and_the_run_goes_on_from_there(config, unbroken, tmp_path):
    process = train(
        config, tmp_path, "--config.training.steps=100000", "--config.training.checkpoint.every=1"
    )
    with killed_in_the_end(process):
        wait_until(lambda: len(steps_of(tmp_path)) > 3, process)
        process.terminate()
        ((said, errors),) = finish(process)
    step = steps_of(tmp_path)[-1]
    assert f"step {step}, SIGTERM; the run is in {tmp_path}" in said and errors == ""
    assert saved_steps(tmp_path)[-1] == step < STEPS

    finish(train(config, tmp_path))
    assert learnt(tmp_path)[-1] == learnt(unbroken)[-1]
    assert losses(tmp_path) == losses(unbroken)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(config, unbroken, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    newest = workdir / "checkpoints" / f"{STEPS:08d}"
    damage(max(newest.rglob("d/*"), key=lambda path: path.stat().st_size))
    ((said, errors),) = finish(train(config, workdir))
    assert f"Checkpoint {newest} is damaged and was skipped: file " in errors
    assert f"step {STEPS - 1}/{STEPS}" in said
    assert_same_record(workdir, unbroken)


def damage(path: Path) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- two hosts ---------------------------------------------------------------------------------------------

ROWS_APART = ["--config.training.mesh.data=2", "--config.training.mesh.tensor=2"]
ROWS_SHARED = ["--config.training.mesh.data=1", "--config.training.mesh.tensor=4"]


def train_on_two_hosts(config: Path, workdir: Path, *arguments: str) -> list[subprocess.Popen]:
    """Two processes of two devices each, that meet over the loopback."""
    job = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    return [train(config, workdir, *job, f"--process_id={i}", *arguments, devices=2) for i in range(2)]


def is_silent(output: str) -> bool:
    """Whether the trainer printed nothing; the library that connects hosts reports each connection."""
    return not any(word in output for word in ("step", "loss", "parameters"))


def test_two_hosts_learn_what_one_does(config, text_folder, tmp_path):
    """One signal to one of them stops both; they go on with another mesh; one host reads what they saved."""
    workdir = tmp_path / "two"
    processes = train_on_two_hosts(config, workdir, *ROWS_APART, "--config.training.steps=100000")
    with killed_in_the_end(*processes):
        wait_until(lambda: len(steps_of(workdir)) > 3, *processes)
        processes[1].send_signal(signal.SIGTERM)
        (said, _), (quiet, _) = finish(*processes)
    step = steps_of(workdir)[-1]
    assert f"step {step}, a signal to another host; the run is in" in said and is_silent(quiet)
    assert step % 10 == 0 and saved_steps(workdir)[-1] == step

    steps = f"--config.training.steps={step + 4}"
    (said, _), (quiet, _) = finish(*train_on_two_hosts(config, workdir, *ROWS_SHARED, steps))
    assert f"step {step + 4}, complete; the run is in" in said and is_silent(quiet)
    assert steps_of(workdir) == list(range(1, step + 5))
    assert len(list(workdir.glob("metrics.jsonl*"))) == 1 and (workdir / "loss.png").exists()
    assert len(list((workdir / "tensorboard").iterdir())) == 2, "one file a start, written by one host"

    experiment = load_config(workdir)
    training = dataclasses.replace(experiment.training, mesh=MeshConfig())
    experiment = dataclasses.replace(experiment, training=training)
    run(experiment, tmp_path / "one", jax.devices()[:1])
    np.testing.assert_allclose(
        list(losses(workdir).values()), list(losses(tmp_path / "one").values()), rtol=2e-5
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    pair = [restore_params(folder, open_task(experiment), mesh) for folder in (workdir, tmp_path / "one")]
    assert pair[0][0] == pair[1][0] == step + 4
    jax.tree.map(
        lambda two, one: np.testing.assert_allclose(two, one, rtol=1e-3, atol=2e-5), pair[0][1], pair[1][1]
    )
