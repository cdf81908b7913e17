"""train.py and eval.py run as a person runs them, for the tests that look at exit codes, messages and files.

`start` is a process like any other. `Programs` is cheaper by the seconds that imports take: a server process imports
once, and forks a child for each command line, which runs the file as `python FILE ARGUMENTS` would.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LIMIT = 180  # seconds, after which a program counts as hanging

TINY = """
from attnlab.config import default_config, with_variant

def get_config(variant=""):
    config = default_config()
    config.model.update(
        layers="forgetting(implementation='reference')", num_layers=1, hidden_size=16, num_heads=4, head_dim=4,
        mlp_size=32, init_std=0.1,
    )
    config.data.update(
        source="local:{text}", split="train[:90%]", eval_split="train[90%:]", data_dir="{data}", sequence_length=16,
        batch_size=8,
    )
    config.training.update(steps=24, log_every=1, eval_every=8)
    config.training.optimizer.schedule.update(peak=1e-2, warmup_steps=2, shape="constant")
    config.training.checkpoint.every = 2
    config.eval.update(batches=0, sample_tokens=3, samples=1)
    return with_variant(config, variant)
"""


def write_tiny_config(folder: Path, text: Path) -> Path:
    """A config file of a run of 24 quick steps on the files in `text`, saved every two steps."""
    path = folder / "tiny.py"
    path.write_text(TINY.format(text=text, data=folder / "data"))
    return path


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of this process with another number of CPU devices."""
    others = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return " ".join([*others, f"--xla_force_host_platform_device_count={devices}"])


def start(program: str, *arguments: str, devices: int = 1) -> subprocess.Popen:
    """The program in a process of its own; `communicate` gives (what it printed, errors and warnings)."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": xla_flags(devices)}
    command = [sys.executable, str(REPOSITORY / program), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended: its exit code (minus the signal that killed it) and what it said."""

    code: int
    out: str
    err: str


class Programs:
    """Context in which `run` runs programs with `folder` as their working directory."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Programs:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.programs"],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=LIMIT)
        self._server.stdout.close()

    def run(self, *command: str, devices: int = 1, file_size: int | None = None) -> Result:
        """`python COMMAND` on so many devices; writing a file beyond `file_size` bytes fails, as on a full disk."""
        request = {"command": command, "xla_flags": xla_flags(devices), "file_size": file_size}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Result(**json.loads(self._server.stdout.readline()))


def serve() -> None:
    """Answer each line of standard input, a request, with a line of standard output, its Result."""
    import attnlab.experiment  # noqa: F401  (what takes long to import; it must not touch a device before the fork)

    for line in sys.stdin:
        request, out, err = json.loads(line), Path("out.txt").absolute(), Path("err.txt").absolute()
        child = os.fork()
        if child == 0:
            become(request, out, err)
            return
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"code": code, "out": out.read_text(), "err": err.read_text()}), flush=True)


def become(request: dict, out: Path, err: Path) -> None:
    """Run the program in this process, which ends as it would."""
    signal.alarm(LIMIT)
    writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, (path, mode) in enumerate([(os.devnull, os.O_RDONLY), (out, writing), (err, writing)]):
        os.dup2(os.open(path, mode, 0o644), number)
    if request["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    os.environ["XLA_FLAGS"] = request["xla_flags"]
    program, *arguments = request["command"]
    sys.argv = [str(REPOSITORY / program), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve()
