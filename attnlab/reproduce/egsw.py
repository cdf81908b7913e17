"""EGSW against GRPO on countdown (arXiv 2503.22456): does weighting by entropy explore better?

    python -m attnlab.reproduce.egsw --out=runs/egsw [--seeds=3] [--steps=100] [--methods=grpo,egsw,...] [--smoke]

Makes one warm start by supervised learning, then trains every method from it with every seed (configs/sft_problems.py
and configs/grpo_countdown.py), two runs at a time with a core each. Run it again to go on: finished runs are kept. OUT
gets table.csv, table.md (with what is claimed, and whether it shows) and curves.png; everything in them is computed
from the runs' metrics.jsonl and final evaluations.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from attnlab.reproduce import figures, tables
from attnlab.reproduce.claims import findings
from attnlab.reproduce.histories import by_method, read_history
from attnlab.reproduce.runs import Run, perform_all
from attnlab.training.files import write_atomically

# method -> variant of configs/grpo_countdown.py
METHODS = {
    "grpo": "",
    "egsw": "egsw",
    "egsw_alpha0": "egsw_alpha0",
    "entropy_bonus": "entropy_bonus",
    "egsw_alpha2": "egsw_alpha2",
    "egsw_step": "egsw_step",
}
USUAL = "grpo,egsw,egsw_alpha0,entropy_bonus"
FULL, SMALL = 512, 8  # held-out problems at the end of each run
SMALL_CHANGES = (("eval.problem_samples", 8), ("eval.pass_at", (1, 4, 8)))  # as in the full form


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    methods = options.methods.split(",")
    for method in methods:
        if method not in METHODS:
            raise SystemExit(f"method {method!r} is unknown; choose among {', '.join(METHODS)}")
    began = time.monotonic()
    start = warm_start(options.out, options.smoke)
    seconds = perform_all([start], 1, options.out / "compiled")
    runs = {
        (method, seed): rl_run(options.out, start, method, seed, options.steps, options.smoke)
        for seed in range(1, options.seeds + 1)
        for method in methods
    }
    seconds += perform_all(list(runs.values()), options.processes, options.out / "compiled")
    print(f"{time.monotonic() - began:.0f} seconds, {seconds:.0f} CPU-seconds of runs")
    print(report(options.out, start, runs))
    return 0


def warm_start(out: Path, smoke: bool = False) -> Run:
    """Supervised learning on solutions; every RL run begins with its parameters."""
    if smoke:
        return Run("sft_problems", "smoke", out / "start", SMALL_CHANGES, SMALL)
    return Run("sft_problems", "", out / "start", (), FULL)


def rl_run(out: Path, start: Run, method: str, seed: int, steps: int, smoke: bool = False) -> Run:
    """One method with one seed, which decides problems, samples and order."""
    changes = (("init_from", str(start.workdir)), ("training.seed", seed), ("data.seed", seed))
    workdir, variant = out / f"{method}-{seed}", METHODS[method]
    if smoke:
        form = f"{variant},smoke" if variant else "smoke"
        return Run("grpo_countdown", form, workdir, changes + SMALL_CHANGES, SMALL)
    return Run("grpo_countdown", variant, workdir, (*changes, ("training.steps", steps)), FULL)


def report(out: Path, start: Run, runs: dict[tuple[str, int], Run]) -> str:
    """Write table.csv, table.md and curves.png of finished runs; returns the text of table.md."""
    first = json.loads(start.answers.read_text())["scalars"]
    found = by_method([read_history(*key, run.workdir, first) for key, run in runs.items()])
    text = tables.as_markdown(found, first, findings(found))
    write_atomically(out / "table.csv", tables.as_csv(found))
    write_atomically(out / "table.md", text)
    figures.draw(found, out / "curves.png")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attnlab.reproduce.egsw", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/egsw"), help="folder of the runs and results")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--steps", type=int, default=100, help="rollouts of each run")
    parser.add_argument("--methods", default=USUAL, help=f"among {', '.join(METHODS)}")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--smoke", action="store_true", help="every run in its form of a few seconds")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
