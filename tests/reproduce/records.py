"""Folders of runs with metrics made by hand."""

import json
from pathlib import Path

START = {"accuracy": 0.4, "mean_at_8": 0.3, "pass_at_8": 0.85, "entropy": 0.55}
STEPS = 30
EVERY = 10  # steps between evaluations


def metrics(reward: float, entropy: float, zero_std: float, ess: float | None = None) -> list[dict]:
    """Reward rises from 0.3 in a straight line to `reward`; the rest is constant; 100 tokens a step."""
    records = []
    for step in range(1, STEPS + 1):
        values = {
            "reward": 0.3 + (reward - 0.3) * step / STEPS,
            "entropy": entropy,
            "frac_reward_zero_std": zero_std,
        }
        values |= {"tokens": 100.0 * step} | ({} if ess is None else {"egsw/ess": ess})
        records.append({"step": step} | {f"train/{name}": value for name, value in values.items()})
        if step % EVERY == 0:
            held_out = {
                "accuracy": 0.5,
                "mean_at_8": 0.3 + step / 300,
                "pass_at_8": 0.8,
                "tokens": 100.0 * step,
            }
            records.append({"step": step} | {f"validation/{name}": value for name, value in held_out.items()})
    return records


def write_run(folder: Path, records: list[dict], final: dict[str, float], problems: int = 512) -> Path:
    """As a run leaves them: metrics.jsonl and eval/problems.json."""
    (folder / "eval").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    answers = {"step": STEPS, "options": {"problems": problems}, "scalars": final}
    (folder / "eval" / "problems.json").write_text(json.dumps(answers))
    return folder


def final(mean_at_8: float, pass_at_8: float) -> dict[str, float]:
    return {"accuracy": 0.45, "mean_at_8": mean_at_8, "pass_at_8": pass_at_8, "entropy": 0.3}
