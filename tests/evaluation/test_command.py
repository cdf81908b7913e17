"""eval.py from flags to files, and each of its refusals in one sentence with exit code 2."""

import csv
import dataclasses
import importlib
import json

import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver

from attnlab import cli
from attnlab.config import ConfigError, Experiment, to_dict
from attnlab.evaluation import Result, command, find_evaluator
from attnlab.training.checkpoints import CheckpointConfig, Checkpoints
from attnlab.training.files import CHECKPOINTS, CONFIG
from attnlab.training.loop import train
from attnlab.training.sharding import MeshConfig
from tests.evaluation import small

EVAL_PROGRAM = importlib.import_module("eval")


def test_names():
    assert command.parse_names("held_out, generate,held_out") == ("held_out", "generate")
    with pytest.raises(ValueError, match="unknown evaluator 'heldout'; did you mean 'held_out'?"):
        command.parse_names("generate,heldout")
    with pytest.raises(ValueError, match="known: held_out, per_position, generate"):
        find_evaluator("xyz")
    with pytest.raises(ValueError, match="no evaluator"):
        command.parse_names(" ,")


@pytest.mark.smoke
def test_override():
    settings = ["eval.batches=4", "eval.sample_prompt=3", "eval.temperature=1", "data.data_dir=/a"]
    settings += [
        "model.mixers.forgetting.implementation=reference",
        "training.mesh.tensor=2",
        "eval.batches=5",
    ]
    changed = command.override(Experiment(), settings)
    assert (changed.eval.batches, changed.eval.sample_prompt, changed.eval.temperature) == (5, "3", 1.0)
    assert changed.data.data_dir == "/a"
    assert changed.model.mixers["forgetting"].implementation == "reference"
    assert changed.training.mesh.tensor == 2
    assert Experiment() == Experiment() != changed


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("eval.batchs=4", "has no field 'batchs'; did you mean 'batches'"),
        ("eval.batches=four", "batches='four' is a str; it must be a int"),
        ("eval.batches", "write it like eval.batches=4"),
        ("training.steps=4", "has no effect here"),
        ("evaluation.batches=4", "has no effect here"),
        ("data.batch_size=4", "set eval.batch_size instead"),
        ("model.mixers.foo.implementation=reference", "has no entry 'foo'"),
    ],
)
def test_settings_that_do_not_fit(setting, sentence):
    with pytest.raises(ConfigError, match=sentence):
        command.override(Experiment(), [setting])


def test_mesh_of_the_run_or_of_the_machine():
    assert dict(command.open_mesh(MeshConfig(data=2, tensor=4), 6).shape)["tensor"] == 4
    assert dict(command.open_mesh(MeshConfig(data=16, tensor=4), 8).shape)["data"] == 8
    assert command.open_mesh(MeshConfig(data=16), 6).size == 2, "the saved position divides by 2"


def test_choose_step(tmp_path):
    config = CheckpointConfig(keep_last=3, asynchronous=False)
    with pytest.raises(ConfigError, match="no checkpoint; train this run first"):
        command.choose_step(tmp_path, config, None, False)
    with Checkpoints(str(tmp_path / CHECKPOINTS), config) as saved:
        saved.save(1, {"x": jnp.zeros(2)}, force=True)
    with pytest.raises(ConfigError, match="validation/loss"):
        command.choose_step(tmp_path, config, None, True)
    with Checkpoints(str(tmp_path / CHECKPOINTS), config) as saved:
        for step, loss in ((2, 1.0), (3, 1.5)):
            saved.save(step, {"x": jnp.zeros(2)}, metrics={"validation/loss": loss}, force=True)
    assert command.choose_step(tmp_path, config, None, False) is None
    assert command.choose_step(tmp_path, config, 1, False) == 1
    assert command.choose_step(tmp_path, config, None, True) == 2
    with pytest.raises(ConfigError, match=r"no checkpoint of step 7; it has \[1, 2, 3\]"):
        command.choose_step(tmp_path, config, 7, False)
    with pytest.raises(ConfigError, match="contradict"):
        command.choose_step(tmp_path, config, 1, True)


def test_report():
    about = {"step": 3, "split": "test", "options": {}}
    scalars = {"loss": 1.25, "loss_se": 0.5, "targets": 12345.0}
    lines = command.report(Result(scalars, text="hello", name="held_out", about=about)).splitlines()
    assert lines[0] == "held_out (step 3, split test)"
    assert [line.split() for line in lines[1:]] == [
        ["loss", "1.2500", "+-", "0.5000"],
        ["targets", "12,345"],
        ["hello"],
    ]


# --- the program -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of one step on a folder of text."""
    root = tmp_path_factory.mktemp("run")
    (root / "text").mkdir()
    for number, text in enumerate(small.documents([300] * 60)):
        (root / "text" / f"{number}.txt").write_bytes(text)
    experiment = small.context([]).experiment
    data = dataclasses.replace(
        experiment.data, source=f"local:{root / 'text'}", data_dir=str(root / "data"), batch_size=8
    )
    checkpoint = dataclasses.replace(experiment.training.checkpoint, asynchronous=False)
    optimizer = experiment.training.optimizer
    schedule = dataclasses.replace(optimizer.schedule, warmup_steps=0)
    training = dataclasses.replace(
        experiment.training,
        steps=1,
        checkpoint=checkpoint,
        optimizer=dataclasses.replace(optimizer, schedule=schedule),
    )
    experiment = dataclasses.replace(experiment, data=data, training=training)
    folder = root / "run"
    task = EVAL_PROGRAM.open_task(experiment)
    train(training, task, folder)
    (folder / CONFIG).write_text(json.dumps(to_dict(experiment)))
    return folder


def evaluate(workdir, **options) -> None:
    """main() as the command line would call it."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(workdir=str(workdir), **options), cli.fail_in_one_sentence("eval.py"):
        EVAL_PROGRAM.main([])


def test_all_evaluators_of_a_trained_run(workdir, capsys):
    few = ["eval.batches=2", "eval.sample_tokens=5", "eval.per_position_length=32"]
    evaluate(workdir, prompt="xyz", set=few, split="train[:20]", best=True)
    shown = capsys.readouterr().out
    for name in ("held_out", "per_position", "generate"):
        content = json.loads((workdir / "eval" / f"{name}.json").read_text())
        assert (content["evaluator"], content["step"], content["split"]) == (name, 1, "train[:20]")
        assert content["options"]["batches"] == 2
        assert f"{name} (step 1, split train[:20])" in shown and f"{name}.json" in shown
    with (workdir / "eval" / "per_position.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 32
    for name in ("held_out.png", "per_position.png"):
        assert (workdir / "eval" / name).stat().st_size > 100
    assert "xyz" in (workdir / "eval" / "generate.txt").read_text()
    held_out = json.loads((workdir / "eval" / "held_out.json").read_text())["scalars"]
    assert held_out["targets"] == 2 * 8 * 16


def test_evaluation_equals_that_of_training(workdir, capsys):
    evaluate(workdir, eval="held_out")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    trained = [json.loads(line) for line in lines if "validation/loss" in line][-1]
    evaluated = json.loads((workdir / "eval" / "held_out.json").read_text())["scalars"]
    for name, value in evaluated.items():
        assert trained[f"validation/{name}"] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"eval": "held_uot"}, "unknown evaluator 'held_uot'; did you mean 'held_out'?"),
        ({"step": 5}, "no checkpoint of step 5; it has [1]"),
        ({"set": ["eval.bathces=1"]}, "did you mean 'batches'"),
        ({"set": ["eval.samples=0"]}, "eval.samples=0 must be at least 1"),
        ({"eval": "generate", "prompt": "long", "set": ["eval.sample_max_length=9"]}, "above the limit of 9"),
        ({"split": "tset"}, "has no split 'tset'"),
    ],
)
def test_refusals_are_one_sentence(workdir, capsys, options, sentence):
    with pytest.raises(SystemExit) as stop:
        evaluate(workdir, **options)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert sentence in message[-1] and message[-1].startswith("eval.py: ")


def test_folders_that_are_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate(tmp_path / "nothing")
    assert stop.value.code == 2 and "is not the folder of a run" in capsys.readouterr().err
    (tmp_path / CONFIG).write_text(json.dumps(to_dict(Experiment())))
    with pytest.raises(SystemExit) as stop:
        evaluate(tmp_path)
    assert stop.value.code == 2 and "has no checkpoint" in capsys.readouterr().err
