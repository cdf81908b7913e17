"""The evaluators by name."""

import dataclasses
import difflib

from attnlab.evaluation import generation, held_out, per_position, problems, skipped
from attnlab.evaluation.config import EvalConfig
from attnlab.evaluation.evaluator import Context, Evaluator, Result

EVALUATORS: dict[str, Evaluator] = {
    "held_out": held_out.run,
    "per_position": per_position.run,
    "generate": generation.run,
    "skipped": skipped.run,
    "problems": problems.run,
}


def find_evaluator(name: str) -> Evaluator:
    """The evaluator called `name`; ValueError with the nearest name otherwise."""
    if name in EVALUATORS:
        return EVALUATORS[name]
    near = difflib.get_close_matches(name, EVALUATORS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(EVALUATORS)}"
    raise ValueError(f"unknown evaluator {name!r}; {hint}")


def run(name: str, context: Context, config: EvalConfig | None = None) -> Result:
    """Run one evaluator with `config`, or with the experiment's own options."""
    evaluate = find_evaluator(name)
    config = config or context.experiment.eval
    config.validate()
    about = {"step": context.step, "split": context.split_name, "options": dataclasses.asdict(config)}
    return dataclasses.replace(evaluate(context, config), name=name, about=about)
