"""From random weights to a policy that sorts: supervised warm start, then GRPO, as the files of configs/ say."""

import json

import pytest

from attnlab.reproduce.runs import Run, perform_all

MEAN_AT_8 = 0.65  # measured: 0.37 after the warm start, 0.83 in the end


@pytest.mark.thorough
@pytest.mark.processes
@pytest.mark.parametrize("weights", ["none", "egsw"])
def test_sixty_steps_of_grpo_teach_sorting(weights, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "sort"  # the warm start is shared
    start = Run("sft_problems", "sort", folder / "start", final_problems=128)
    run = Run(
        "grpo_sort",
        "",
        folder / weights,
        (("init_from", str(start.workdir)), ("training.eval_every", 0), ("grpo.weights.name", weights)),
        final_problems=128,
    )
    for each in (start, run):
        perform_all([each], 1, folder / "compiled")
    before, after = (json.loads(each.answers.read_text())["scalars"]["mean_at_8"] for each in (start, run))
    assert before < 0.5, "the warm start leaves something to learn"
    assert after > MEAN_AT_8
