"""The reproduction: what is run, what is skipped, what is written."""

import csv
import io
import json
import shlex
import subprocess
import sys

import pytest

from attnlab.config import ConfigError, to_dict
from attnlab.reproduce import egsw
from attnlab.reproduce.runs import Run, perform_all
from tests.programs import REPOSITORY
from tests.reproduce import records


@pytest.fixture
def reported(tmp_path):
    """The text of a report on GRPO with two seeds and EGSW with one, in tmp_path."""
    start = egsw.warm_start(tmp_path)
    records.write_run(start.workdir, [], records.START)
    runs = {key: egsw.rl_run(tmp_path, start, *key, 100) for key in (("grpo", 1), ("grpo", 2), ("egsw", 1))}
    for (method, seed), run in runs.items():
        ess = 0.75 if method == "egsw" else None
        records.write_run(
            run.workdir, records.metrics(0.4 + seed / 10, 0.2, 0.5, ess), records.final(0.4, 0.6 + seed / 10)
        )
    return egsw.report(tmp_path, start, runs)


@pytest.mark.smoke
class TestReport:
    def test_the_csv_has_a_row_a_run(self, reported, tmp_path):
        rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
        assert [(row["method"], row["seed"], row["tokens"]) for row in rows] == [
            ("grpo", "1", "3000"), ("grpo", "2", "3000"), ("egsw", "1", "3000"),
        ]  # fmt: skip
        assert [row["pass_at_8"] for row in rows] == ["0.7000", "0.8000", "0.7000"]
        assert [row["ess"] for row in rows] == ["1.0000", "1.0000", "0.7500"]

    def test_the_table_has_means_and_deviations(self, reported, tmp_path):
        assert reported == (tmp_path / "table.md").read_text()
        lines = [line.split(" | ") for line in reported.splitlines() if line.startswith("| ")]
        heading = [cell.strip("| ") for cell in lines[0]]
        start, grpo, weighted = (
            dict(zip(heading, (cell.strip("| ") for cell in line), strict=True)) for line in lines[2:]
        )
        assert (start["mean@8"], start["entropy"], start["reward"]) == ("0.300", "0.550", "")
        assert (grpo["run"], grpo["seeds"], grpo["step"]) == ("grpo", "2", "30")
        assert grpo["pass@8"] == "0.750 +- 0.071 (0.700 0.800)"
        assert weighted["pass@8"] == "0.700"  # a single seed has no deviation

    def test_every_claim_has_its_sentence_and_the_figure_is_there(self, reported, tmp_path):
        assert (
            "- **gate** pass@8 is not lower: egsw - grpo = +0.000 (+0.000; asked: at least +0.00): shows."
            in reported
        )
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


class TestRuns:
    def test_changes_reach_the_experiment(self, tmp_path):
        run = egsw.rl_run(tmp_path, egsw.warm_start(tmp_path), "egsw_alpha0", 7, 40)
        experiment = run.experiment()
        assert (experiment.training.seed, experiment.data.seed, experiment.training.steps) == (7, 7, 40)
        assert experiment.init_from == str(tmp_path / "start")
        assert (experiment.grpo.weights.name, experiment.grpo.weights.alpha) == ("egsw", 0.0)

    def test_all_runs_share_the_model_of_the_warm_start(self, tmp_path):
        start = egsw.warm_start(tmp_path).experiment()
        for method in egsw.METHODS:
            experiment = egsw.rl_run(tmp_path, egsw.warm_start(tmp_path), method, 1, 40).experiment()
            assert experiment.model == start.model and experiment.data.tokenizer == start.data.tokenizer

    def test_the_command_is_the_run(self, tmp_path):
        run = egsw.rl_run(tmp_path / "a folder", egsw.warm_start(tmp_path), "egsw", 2, 40, smoke=True)
        words = shlex.split(run.command())
        assert words[:3] == ["python", "train.py", "--config=configs/grpo_countdown.py:egsw,smoke"]
        assert words[-1] == f"--workdir={tmp_path}/a folder/egsw-2"
        assert {"--config.training.seed=2", "--config.eval.pass_at=(1, 4, 8)"} < set(words)

    def test_unknown_fields_and_methods_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="no field 'sede'; did you mean 'seed'"):
            Run("grpo_countdown", "", tmp_path, (("training.sede", 1),)).experiment()
        with pytest.raises(SystemExit, match="method 'egws' is unknown; choose among grpo, egsw"):
            egsw.main(["--methods=grpo,egws", f"--out={tmp_path}"])
        assert not list(tmp_path.iterdir())

    def test_only_the_very_run_counts_as_done(self, tmp_path, capfd):
        def run(**changes):
            fields = tuple({"training.steps": records.STEPS, **changes}.items())
            return Run("grpo_countdown", "egsw", tmp_path / "run", fields)

        assert not run().is_done()
        records.write_run(run().workdir, [], records.START)
        (run().workdir / "config.json").write_text(json.dumps(to_dict(run().experiment())))
        assert run().is_done() and perform_all([run()], 2, tmp_path / "compiled") == 0
        assert "done before" in capfd.readouterr().out and not (tmp_path / "compiled").exists()
        for other in (
            {"training.steps": 31},
            {"grpo.weights.alpha": 1.0},
            {"data.seed": 1},
            {"init_from": "x"},
        ):
            assert not run(**other).is_done(), other
        assert not Run("grpo_countdown", "egsw", run().workdir, run().changes, final_problems=8).is_done()


@pytest.mark.thorough
@pytest.mark.processes
def test_the_smoke_form_goes_from_nothing_to_the_report_and_is_not_run_twice(tmp_path):
    command = [sys.executable, "-m", "attnlab.reproduce.egsw", f"--out={tmp_path}", "--smoke", "--seeds=1"]
    command += ["--methods=grpo,egsw"]
    first = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stderr
    assert "| egsw | 1 | 12 |" in first.stdout
    assert all(
        (tmp_path / name).exists() for name in ("table.csv", "table.md", "curves.png", "egsw-1/loss.png")
    )
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.count("done before") == 3, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")} == written
