"""The GRPO benchmark counts what it times, and says why TRL is missing where it is. No timing is judged."""

import csv

import numpy as np
import pytest

from benchmarks import grpo, grpo_setup, grpo_table
from benchmarks.grpo_setup import Seconds, Size

SMALLEST = {"prompts": 3, "group": 2, "prompt_tokens": 2, "new_tokens": 2, "layers": 1}
SMALLEST |= {"hidden_size": 4, "heads": 1, "mlp_size": 5, "vocabulary": 7}
SIZE = Size(**SMALLEST)


def test_without_trl_a_run_measures_this_project_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(grpo, "NEEDED", ("no_such_library",))
    options = [f"--{name}={value}" for name, value in SMALLEST.items()]
    assert grpo.main([*options, "--steps=2", "--warmup=1", f"--out={tmp_path}"]) == 0
    with (tmp_path / "grpo.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["side"] == "attnlab" and row["steps"] == "2"
    assert int(row["parameters"]) == 2 * 7 * 4 + 4 * 4 * 4 + 3 * 4 * 5 + 3 * 4
    assert all(float(row[name]) > 0 for name in grpo_table.COLUMNS[1:])
    text = (tmp_path / "grpo.md").read_text()
    assert "TRL was not measured: no_such_library not installed." in text
    assert text.count("\n| ") == 2 and "| attnlab | " in text


@pytest.mark.thorough
def test_with_trl_both_sides_have_the_same_parameters_and_take_turns(tmp_path):
    for name in grpo.NEEDED:
        pytest.importorskip(name)
    rows, against = grpo.measure(SIZE, tmp_path, steps=2, warmup=1, alone=False)
    assert [row["side"] for row in rows] == ["attnlab", "TRL"]
    assert rows[0]["parameters"] == rows[1]["parameters"] and rows[0]["steps"] == rows[1]["steps"] == 2
    assert all(ratio > 0 for ratio in against)


def test_medians_leave_the_warm_up_out_and_ratios_go_turn_by_turn():
    ours = [Seconds(9, 9, 99), Seconds(1, 2, 4), Seconds(2, 4, 8), Seconds(4, 8, 16)]
    theirs = [Seconds(1, 1, 3), *(Seconds(3 * r, u / 2, s) for r, u, s in ours[1:])]
    rows = [grpo_table.row(name, 11, steps, 1, SIZE) for name, steps in (("attnlab", ours), ("TRL", theirs))]
    assert rows[0]["rollout_seconds"] == 2 and rows[0]["step_seconds"] == 8 and rows[0]["steps"] == 3
    assert rows[0]["other_seconds"] == 2 and rows[0]["first_step_seconds"] == 99
    assert rows[0]["rollout_tokens_per_second"] == 3 * 2 * 2 / 2
    assert rows[0]["update_tokens_per_second"] == 3 * 2 * (2 + 2) / 4
    against = grpo_table.ratios(ours, theirs, 1)
    assert against == Seconds(3, 0.5, 1)
    text = grpo_table.markdown(rows, against, SIZE, "a machine", 1)
    assert "| time of TRL over attnlab |  |  | 3.00 x | 0.50 x |  | 1.00 x |  |" in text
    assert "11 parameters in attnlab, 11 parameters in TRL" in text


def test_the_prompts_have_exactly_the_tokens_asked_for(tmp_path):
    from attnlab.data.tokenizers import open_tokenizer

    size = Size(prompts=5, prompt_tokens=7, vocabulary=13)
    texts = grpo_setup.write_files(size, tmp_path)
    tokenizer = open_tokenizer(f"hf:{tmp_path / grpo_setup.TOKENIZER}")
    assert tokenizer.vocab_size == 13
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    encoded = [tokenizer.encode(text) for text in texts]
    assert [len(ids) for ids in encoded] == 5 * [7 - 1]  # and BOS
    assert all((ids > 2).all() for ids in encoded)
    assert grpo_setup.even([[2, 4, 5, 6], [1]]) == [0.75, 0.0]


def test_sides_that_compute_different_models_are_not_timed():
    logp = np.full((2, 3), -1.5, np.float32)
    grpo.compare(logp, logp + 1e-5)
    with pytest.raises(ArithmeticError, match="differ by 1.0e-02 nats"):
        grpo.compare(logp, logp - 0.01)
    with pytest.raises(ArithmeticError, match="differ by nan"):
        grpo.compare(logp, logp * np.nan)


def test_sizes_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="--prompt_tokens=1 must be at least 2"):
        Size(prompt_tokens=1).validate()
    with pytest.raises(ValueError, match="--hidden_size=6 must be a multiple of twice --heads=2"):
        Size(hidden_size=6, heads=2).validate()
