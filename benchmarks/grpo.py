"""A GRPO step of this project beside that of Hugging Face TRL: tokens a second in the rollout and in the update.

    python -m benchmarks.grpo [--prompts=32] [--group=8] [--prompt_tokens=8] [--new_tokens=8] [--layers=2]
        [--hidden_size=64] [--heads=4] [--steps=10] [--warmup=2] [--cores=0] [--out=runs/benchmarks/grpo]

Both sides begin with the same weights of the same Llama-like decoder, get the same prompts and draw completions of the
same length; before anything is timed, their log-probabilities are compared. They take turns, one step each, in one
process and on one device, so that the ratio of their times holds when the machine's speed drifts. TRL takes part if it
is installed. Writes grpo.csv and grpo.md into --out.

On a machine that does other work too, --cores=1 is fairest: PyTorch's threads wait for each other after every single
operation, so one that is held up holds up all.
"""

import argparse
import csv
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import grpo_setup as setup
from benchmarks import grpo_table as table

NEEDED = ("torch", "transformers", "trl", "datasets")
AGREEMENT = 1e-3  # nats between the log-probabilities of the two sides, float32 in different orders
COMPARED = 4  # rows whose log-probabilities are


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    size = setup.Size(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(setup.Size)}
    )
    size.validate()
    if options.steps < 1 or options.warmup < 1:
        raise ValueError(f"--steps={options.steps} and --warmup={options.warmup} must be at least 1")
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    note = why_alone()
    with tempfile.TemporaryDirectory() as folder:
        rows, against = measure(size, Path(folder), options.steps, options.warmup, alone=bool(note))
    text = table.markdown(rows, against, size, machine(options.cores), options.warmup, note)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "grpo.csv").open("w", newline="") as file:
        constant = dataclasses.asdict(size) | {"mlp_size": size.inner_size}
        writer = csv.DictWriter(file, [*constant, *table.COLUMNS])
        writer.writeheader()
        writer.writerows(constant | each for each in rows)
    (options.out / "grpo.md").write_text(text)
    print(text)
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo", description=__doc__.splitlines()[0])
    for field in dataclasses.fields(setup.Size):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of each side, of which the median counts"
    )
    parser.add_argument(
        "--warmup", type=int, default=2, help="steps before them, the first of which compiles"
    )
    parser.add_argument("--cores", type=int, default=0, help="that this process may use (on Linux); 0: all")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/grpo"))
    return parser


def why_alone() -> str:
    """A sentence on why TRL cannot be measured here; "" where it can."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"TRL was not measured: {', '.join(missing)} not installed."
    import jax
    import torch

    ours, theirs = jax.default_backend(), "gpu" if torch.cuda.is_available() else "cpu"
    if ours != theirs:
        return f"TRL was not measured: JAX runs on {ours} here but PyTorch on {theirs}, which says nothing."
    return ""


def measure(size: setup.Size, folder: Path, steps: int, warmup: int, alone: bool):
    """(a row of `table.COLUMNS` a side, TRL's times over ours or None). ArithmeticError if the sides differ."""
    from benchmarks.grpo_ours import Ours

    texts, total, taken = setup.write_files(size, folder), warmup + steps, []
    ours = Ours(size, folder, total)
    if alone:
        taken = [ours.step() for _ in range(total)]
        return [table.row("attnlab", ours.parameters, taken, warmup, size)], None
    from benchmarks import grpo_trl

    model = grpo_trl.make_model(size, ours.llama_weights())
    compare(
        *(side(*_rows(size)) for side in (ours.log_probs, lambda *rows: grpo_trl.log_probs(model, *rows)))
    )
    others = grpo_trl.run(model, size, folder, texts, total, lambda: taken.append(ours.step()))
    rows = [
        table.row("attnlab", ours.parameters, taken, warmup, size),
        table.row("TRL", grpo_trl.count(model), others, warmup, size),
    ]
    return rows, table.ratios(taken, others, warmup)


def _rows(size):
    """(prompts, completions) of tokens drawn at random, to compare the sides by."""
    rng = np.random.default_rng(1)
    shapes = (COMPARED, size.prompt_tokens), (COMPARED, size.new_tokens)
    return tuple(rng.integers(len(setup.SPECIAL), size.vocabulary, shape, np.int32) for shape in shapes)


def compare(ours: np.ndarray, theirs: np.ndarray) -> None:
    """ArithmeticError unless the two sides compute the same model."""
    difference = np.abs(ours - theirs).max()
    if not difference < AGREEMENT:
        raise ArithmeticError(f"log-probabilities of attnlab and TRL differ by {difference:.1e} nats")


def machine(cores: int = 0) -> str:
    """Where and with what this ran, in words."""
    import jax

    device = jax.devices()[0]
    where = (
        f"{cores or os.cpu_count()} {platform.machine()} core(s)"
        if device.platform == "cpu"
        else device.device_kind
    )
    found = [name for name in NEEDED[:3] if importlib.util.find_spec(name)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", *found)]
    return f"{where}, {', '.join(versions)}, float32"


# Read when the libraries are loaded. One device a side, as TRL would split a batch over all it sees; memory left for
# the other side; PyTorch's threads waiting without spinning, which on busy cores makes it many times slower.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "0",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}

if __name__ == "__main__":
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    sys.exit(main())
