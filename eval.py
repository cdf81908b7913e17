"""Evaluate a trained run: `python eval.py --workdir=runs/quickstart [--eval=held_out,per_position,generate]`.

Flags in, attnlab out. Numbers, tables and figures go to <workdir>/eval; what they mean is said in attnlab/evaluation.
"""

from pathlib import Path

from absl import app, flags

from attnlab.cli import fail_in_one_sentence, parse_flags
from attnlab.evaluation.command import choose_step, evaluate, open_mesh, override, parse_names
from attnlab.experiment import load_config, open_task, restore_params
from attnlab.training import multihost

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
EVAL = flags.DEFINE_string("eval", "", "evaluators, separated by commas; default: those of the run's task")
STEP = flags.DEFINE_integer("step", None, "checkpoint to evaluate; default: the newest intact one")
BEST = flags.DEFINE_bool("best", False, "evaluate the checkpoint with the lowest validation loss")
SPLIT = flags.DEFINE_string(
    "split", "", "split of the data, such as test; default: the run's data.eval_split"
)
PROMPT = flags.DEFINE_string("prompt", None, "beginning of the sampled text; default: eval.sample_prompt")
SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE, such as eval.batches=4; may be repeated")


def main(_) -> None:
    multihost.initialize()
    names = parse_names(EVAL.value) if EVAL.value else ()
    workdir = Path(WORKDIR.value)
    prompt = [] if PROMPT.value is None else [f"eval.sample_prompt={PROMPT.value}"]
    experiment = override(load_config(workdir), [*SET.value, *prompt])
    step = choose_step(workdir, experiment.training.checkpoint, STEP.value, BEST.value)
    task = open_task(experiment)
    mesh = open_mesh(experiment.training.mesh, experiment.data.batch_size)
    step, params = restore_params(workdir, task, mesh, step)
    context = task.context(params, mesh, step, SPLIT.value)
    evaluate(names or task.evaluators, context, workdir / "eval")


if __name__ == "__main__":
    with fail_in_one_sentence("eval.py"):
        app.run(main, flags_parser=parse_flags)
