"""train.py from flags to files: each mistake is one sentence and loses nothing; every config trains."""

import csv
import importlib.util
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from attnlab.config import ConfigError, from_config_dict
from attnlab.models.language_model import LanguageModel
from attnlab.training.sinks import read_jsonl
from tests.programs import REPOSITORY, Programs, write_tiny_config
from tests.training.runs import write_text

CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))
TINY = "--config=tiny.py"
NEW = "--workdir=new"
OVERRIDE_OF_TYPO = (
    "from attnlab.config import default_config\n\ndef get_config():\n    default_config().modle = 1\n"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """`run(...)` of train.py in a folder with a config file, some text, and things that are in the way."""
    folder = tmp_path_factory.mktemp("program")
    write_tiny_config(folder, write_text(folder / "text"))
    (folder / "blank").mkdir()
    (folder / "blank" / "blank.txt").write_text("\n \n")
    (folder / "file").write_text("in the way")
    (folder / "typo.py").write_text(OVERRIDE_OF_TYPO)
    (folder / "broken.py").write_text("import no_such_module\n")
    for name, content in {
        "cut": '{"task": "lang',
        "number": '{"model": 3}',
        "other": '{"modle": {}}',
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
    with Programs(folder) as programs:
        yield programs


@pytest.fixture(scope="module")
def trained(program):
    """The folder of a run of four steps, saved after two and four."""
    result = program.run("train.py", TINY, "--workdir=trained", "--config.training.steps=4")
    assert result.code == 0, result.err
    return program.folder / "trained"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but those that the test's own server and the preparation of data write."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    own = ("data/", "out.txt", "err.txt", "__pycache__/")
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(own)}


def refused(program: Programs, *arguments: str, code: int = 2, **options) -> str:
    """The sentence with which train.py ends; it must be alone on standard error."""
    result = program.run("train.py", *arguments, **options)
    assert result.code == code, result.out + result.err
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: "), result.err
    return lines[0].removeprefix("train.py: ")


FLAG_MISTAKES = {
    "no config": ([], "give an experiment, such as --config=configs/quickstart.py"),
    "missing config": (["--config=configs/qickstart.py"], "config file configs/qickstart.py does not exist"),
    "config is a folder": (["--config=text"], "Is a directory: 'text'"),
    "config does not run": (["--config=broken.py"], "broken.py line 1: No module named 'no_such_module'"),
    "config sets an unknown field": (["--config=typo.py"], 'typo.py line 4: Key "modle" does not exist'),
    "unknown variant": (
        ["--config=tiny.py:smok"],
        "config variant 'smok' is unknown; use FILE or FILE:smoke",
    ),
    "unknown flag": ([TINY, "--wrkdir=new"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    "no flag": ([TINY, "steps=3"], "argument 'steps=3' is not understood"),
    "unknown field": (
        [TINY, "--config.training.stpes=3"],
        "config.training has no field 'stpes'; did you mean 'steps'?",
    ),
    "unknown part": (
        [TINY, "--config.trainin.steps=3"],
        "config has no field 'trainin'; did you mean 'training'?",
    ),
    "unknown options of a mixer": ([TINY, "--config.model.mixers.sofmax.rope=1"], "did you mean 'softmax'?"),
    "word for a number": (
        [TINY, "--config.training.steps=ten"],
        "--config.training.steps=ten: invalid literal",
    ),
    "fraction for a whole number": (
        [TINY, "--config.training.steps=1.5"],
        "invalid literal for int() .* '1.5'",
    ),
    "number for a part": ([TINY, "--config.model=3"], "flag --config.model=3: .*not a dict"),
}


@pytest.mark.parametrize("name", FLAG_MISTAKES)
def test_a_mistake_in_the_flags_is_one_sentence(name, program):
    arguments, sentence = FLAG_MISTAKES[name]
    before = contents(program.folder)
    assert_in(sentence, refused(program, *arguments))
    assert contents(program.folder) == before


EXPERIMENT_MISTAKES = {
    "missing data": (["data.source=local:nowhere"], 1, "No file or folder matches 'nowhere'"),
    "empty data": (["data.source=local:blank"], 1, "No readable text in 'blank': 1 files"),
    "unknown source": (["data.source=ftp:x"], 1, "source='ftp:x' must begin with one of local, tfds"),
    "unknown split": (["data.split=trian"], 1, "has no split 'trian'"),
    "missing tokeniser": (["data.tokenizer=hf:none.json"], 1, "No tokeniser file at 'none.json'"),
    "unknown mixer": (["model.layers=sofmax"], 1, "unknown mixer 'sofmax'; did you mean 'softmax'?"),
    "unknown kernel": (
        ["model.layers=softmax(implementation='fast')"],
        1,
        "implementation='fast' does not exist",
    ),
    "unknown task": (["task=sorting"], 1, "task='sorting' is unknown; choose one of language_modelling"),
    "too few devices": (["training.mesh.data=4"], 2, "'data': 4, .* does not fill 2 devices"),
    "batch of seven": (["data.batch_size=7"], 2, "data.batch_size=7 is not a multiple of mesh data 2"),
    "heads of three": (["training.mesh.tensor=3"], 3, "'params/embedding' .* cannot be cut into 3"),
}


@pytest.mark.parametrize("name", EXPERIMENT_MISTAKES)
def test_a_mistake_in_the_experiment_is_one_sentence(name, program):
    changes, devices, sentence = EXPERIMENT_MISTAKES[name]
    before, workdir = contents(program.folder), name.replace(" ", "-")
    changes = [f"--config.{change}" for change in changes]
    assert_in(sentence, refused(program, TINY, f"--workdir={workdir}", *changes, devices=devices))
    after = contents(program.folder)
    after.pop(f"{workdir}/config.json", None)  # binds no one without a checkpoint, see the next test
    assert after == before


def test_a_first_try_that_failed_does_not_bind_the_second(program):
    command = [TINY, "--workdir=second", "--config.training.mesh.tensor=3"]
    refused(program, *command, devices=3)
    assert (program.folder / "second" / "config.json").exists()
    assert_in("cannot be cut into 3", refused(program, *command, "--config.model.hidden_size=24", devices=3))


MULTI_HOST_MISTAKES = {
    "half a job": (["--num_processes=2"], "coordinator, process_id is missing"),
    "no port": (["--coordinator=host", "--num_processes=2", "--process_id=0"], "must be written host:port"),
    "too many": (
        ["--coordinator=host:1", "--num_processes=2", "--process_id=2"],
        "process_id=2 must be at least 0",
    ),
}


@pytest.mark.parametrize("name", MULTI_HOST_MISTAKES)
def test_a_mistake_in_the_job_is_one_sentence(name, program):
    arguments, sentence = MULTI_HOST_MISTAKES[name]
    assert_in(sentence, refused(program, TINY, NEW, *arguments))


WORKDIR_MISTAKES = {
    "a file": ("file", "--workdir=file cannot be a folder, as file is a file"),
    "below a file": ("file/run", "--workdir=file/run cannot be a folder, as file is a file"),
    "config.json cut off": ("cut", "cut/config.json does not hold an experiment .*Unterminated string"),
    "config.json of another kind": ("number", "number/config.json does not .*config.model=3 is a int"),
    "config.json of another program": (
        "other",
        "other/config.json does not .* no field 'modle'; did you mean 'model'",
    ),
}


@pytest.mark.parametrize("name", WORKDIR_MISTAKES)
def test_a_workdir_that_is_no_run_is_left_alone(name, program):
    workdir, sentence = WORKDIR_MISTAKES[name]
    before = contents(program.folder)
    assert_in(sentence, refused(program, TINY, f"--workdir={workdir}"))
    assert contents(program.folder) == before


def test_another_experiment_in_the_workdir_is_refused(program, trained):
    before = contents(trained)
    for change, sentence in {
        "model.hidden_size=32": "trained holds a run with model.hidden_size=16, which cannot go on with 32",
        "model.mixers.forgetting.qk_norm=true": "trained holds a run with .*qk_norm.*=False, which cannot",
        "data.batch_size=16": "trained holds a run with data.batch_size=8, which cannot go on with 16",
    }.items():
        assert_in(sentence, refused(program, TINY, "--workdir=trained", f"--config.{change}"))
    assert contents(trained) == before


def test_a_checkpoint_of_another_architecture_is_refused(program, trained):
    """Without the config.json that would have told, the checkpoint's own description does."""
    workdir = copy(trained, "nameless")
    (workdir / "config.json").unlink()
    before = contents(workdir / "checkpoints")
    message = refused(program, TINY, "--workdir=nameless", "--config.model.hidden_size=32")
    assert_in("is of another model or optimiser: .* is float32.* there and float32.* here", message)
    assert contents(workdir / "checkpoints") == before


def test_only_damaged_checkpoints_stop_the_run(program, trained):
    workdir = copy(trained, "damaged")
    for manifest in workdir.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    before = contents(workdir / "checkpoints")
    result = program.run("train.py", TINY, "--workdir=damaged")
    assert result.code == 1 and "Traceback" not in result.err
    assert_in(
        "None of the checkpoints .*step 2: .*; step 4: .* move the folder away", result.err.splitlines()[-1]
    )
    assert contents(workdir / "checkpoints") == before


def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_checkpoint(program, trained):
    """A limit on file sizes, above what metrics need, stands in for a full disk."""
    workdir = copy(trained, "full")
    before = contents(workdir / "checkpoints")
    message = refused(program, TINY, "--workdir=full", "--config.training.steps=8", code=1, file_size=20_000)
    assert_in(
        "checkpoint of step 6 could not be written .*File too large.* earlier checkpoints are untouched",
        message,
    )
    assert contents(workdir / "checkpoints") == before
    assert (
        program.run("train.py", TINY, "--workdir=full", "--config.training.steps=6").code == 0
    )  # there is room again
    steps = [record["step"] for record in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]


def assert_in(pattern: str, text: str) -> None:
    """Like pytest.raises(match=...), where brackets and question marks mean themselves."""
    escaped = pattern.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")
    assert re.search(escaped, text), f"{text!r} has no {pattern!r}"


def copy(run: Path, name: str) -> Path:
    return Path(shutil.copytree(run, run.with_name(name)))


# --- the experiments of configs/ ---------------------------------------------------------------------------


def load(path: Path, *variant: str):
    """The experiment of a config file, and of a variant if one is given."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(*variant))


@pytest.mark.smoke
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_so_is_its_smoke_form(path):
    full, smoke = load(path), load(path, "smoke")
    full.model.validate()
    full.training.validate()
    for devices in (1, 8):
        smoke.validate(devices)
    assert smoke.training.steps <= 20 and smoke.model.hidden_size <= 64, "a smoke form takes seconds"
    assert {name for name, _ in smoke.model.layer_configs()} == {
        name for name, _ in full.model.layer_configs()
    }


RL_CONFIGS = {  # file -> (parameters of its full form, its variants)
    "sft_problems": (141_632, ("", "sort")),
    "grpo_countdown": (141_632, ("", "egsw", "egsw_alpha2", "egsw_alpha0", "egsw_step", "entropy_bonus", "dapo",
                                 "dr_grpo", "gspo", "rloo")),
    "grpo_sort": (141_632, ("",)),
    "grpo_gsm8k": (494_032_768, ("", "egsw")),
    "egsw_math_7b": (7_615_616_512, ("", "grpo")),
}  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("name", RL_CONFIGS)
def test_configs_of_reinforcement_learning(name):
    """Every variant and its smoke form is valid on one device and on eight, and differs from the others."""
    parameters, variants = RL_CONFIGS[name]
    path, seen = REPOSITORY / "configs" / f"{name}.py", []
    for variant in variants:
        full, smoke = load(path, variant), load(path, f"{variant},smoke" if variant else "smoke")
        for devices in (1, 8):
            full.validate(devices)
            smoke.validate(devices)
        assert smoke.init_from == "" and smoke.data.tokenizer == "bytes", "a smoke form needs no files"
        assert smoke.grpo.problems.startswith("problems:")
        assert (smoke.grpo.group_size, smoke.grpo.weights) == (4, full.grpo.weights)
        assert full not in seen and smoke.grpo.policy_loss == full.grpo.policy_loss
        seen.append(full)
    module = LanguageModel(seen[0].model.with_vocab(264))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "known"), [("sft_problems", "countdown, sort"), ("grpo_countdown", ", egsw, ")]
)
def test_unknown_variants_are_refused_with_the_known_ones(name, known):
    with pytest.raises(ConfigError, match=f"variant 'srot' is unknown; choose one of .*{known}"):
        load(REPOSITORY / "configs" / f"{name}.py", "srot")


@pytest.mark.smoke
def test_the_smoke_form_trains_and_says_when_it_is_complete(program):
    (program.folder / "configs").symlink_to(REPOSITORY / "configs")
    text = ["--config.data.source=local:text", "--config.data.data_dir=data"]
    quick = [
        "--config.data.split=train[:90%]",
        "--config.data.eval_split=train[90%:]",
        "--config.eval.sample_tokens=3",
    ]
    command = ["train.py", "--config=configs/quickstart.py:smoke", *text, *quick]
    result = program.run(*command)
    assert result.code == 0 and result.err == "", result.err
    assert "step 12, complete; the run is in runs/quickstart-smoke" in result.out
    check_files_of_run(program.folder / "runs" / "quickstart-smoke")

    before = contents(program.folder)
    again = program.run(*command)
    assert again.code == 0 and again.out == "step 12, already complete; the run is in runs/quickstart-smoke\n"
    assert contents(program.folder) == before


def check_files_of_run(workdir: Path) -> None:
    """Falling loss in every form of metrics, a picture, a sample, an experiment and a checkpoint."""
    records = [record for record in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in record]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.1
    with (workdir / "train.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [r["train/loss"] for r in records]
    with (workdir / "validation.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["6", "12"]
    assert len(list((workdir / "tensorboard").glob("events.out.tfevents.*"))) == 1
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "eval" / "generate.txt").read_text().count("def ") == 2
    assert json.loads((workdir / "config.json").read_text())["training"]["steps"] == 12
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["00000006", "00000012"]


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_picture(program, trained):
    workdir = copy(trained, "unpictured")
    shutil.rmtree(workdir / "eval")
    (workdir / "loss.png").unlink()
    result = program.run("train.py", TINY, "--workdir=unpictured", "--config.training.steps=4")
    assert result.code == 0 and "step 4, complete" in result.out, result.err
    assert (workdir / "loss.png").exists() and (workdir / "eval" / "generate.txt").exists()
    assert (workdir / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()
