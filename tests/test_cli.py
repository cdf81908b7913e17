"""What the programs share: errors in one sentence with an exit code, the flags' defaults, the run's folder."""

import sys
import types
from pathlib import Path

import pytest
from absl import flags

from attnlab import cli
from attnlab.config import ConfigError
from attnlab.training.checkpoints import CheckpointError

CONFIG = """
from attnlab.config import default_config, with_variant

def get_config(variant=""):
    return with_variant(default_config(), variant)
"""


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """parse(*arguments) -> the flags of a program that has --config, given a file tiny.py in its folder."""
    values = flags.FlagValues()
    flags.DEFINE_integer("verbosity", -1, "as absl defines it", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(CONFIG)
    config_file = cli.config_flags.DEFINE_config_file
    monkeypatch.setattr(
        cli.config_flags, "DEFINE_config_file", lambda *a, **k: config_file(*a, **k, flag_values=values)
    )
    register = flags.register_validator
    monkeypatch.setattr(flags, "register_validator", lambda *a: register(*a, flag_values=values))
    cli.config_flag("config", "experiment")

    def parse(*arguments: str) -> flags.FlagValues:
        monkeypatch.setattr(sys, "argv", ["program.py", *arguments])
        cli.parse_flags(sys.argv)
        return values

    return parse


class TestFlags:
    def test_a_field_is_set_in_the_config_of_the_file(self, parse):
        values = parse("--config=tiny.py", "--config.training.steps=7", "--config.data.data_dir=here")
        assert values.config.training.steps == 7 and values.config.data.data_dir == "here"

    def test_libraries_are_quiet_unless_asked(self, parse):
        assert parse("--config=tiny.py").verbosity == cli.FATAL_ONLY

    def test_a_given_verbosity_is_kept(self, parse):
        assert parse("--config=tiny.py", "--verbosity=0").verbosity == 0

    def test_the_workdir_is_named_after_the_config(self, parse):
        parse("--config=./tiny.py")
        assert cli.default_workdir("config") == Path("runs/tiny")

    def test_and_after_its_variant(self, parse):
        parse("--config=./tiny.py:smoke")
        assert cli.default_workdir("config") == Path("runs/tiny-smoke")

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ([], "give an experiment, such as --config=configs/quickstart.py"),
            (["--config=none.py"], "program.py: config file none.py does not exist"),
            (["--config=tiny.py:x"], "program.py: tiny.py line 5: config variant 'x' is unknown"),
            (["--config=tiny.py", "x"], "program.py: argument 'x' is not understood"),
            (
                ["--config=tiny.py", "--config.training.stpes=3"],
                "program.py: config.training has no field 'stpes'",
            ),
        ],
    )
    def test_mistakes(self, arguments, sentence, parse, capsys):
        with pytest.raises(SystemExit) as end:
            parse(*arguments)
        assert end.value.code == cli.USAGE_ERROR
        told = capsys.readouterr()
        assert sentence in told.err and told.err.count("\n") == 1 and told.out == ""


class TestWorkdir:
    def test_a_folder_may_be_there_or_not(self, tmp_path):
        for workdir in (tmp_path, tmp_path / "new", tmp_path / "new" / "run"):
            assert cli.check_workdir(workdir) == workdir

    @pytest.mark.parametrize("name", ["file", "file/run"])
    def test_a_file_is_in_the_way(self, name, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=f"{name} cannot be a folder, as {tmp_path / 'file'} is a file"):
            cli.check_workdir(tmp_path / name)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("two\n  lines\t and   blanks"), "two lines and blanks"),
        (ValueError(), "ValueError"),
        (KeyError("a name"), "a name"),
        (KeyError(3), "3"),
        (AttributeError(KeyError("inside")), "inside"),
        (
            KeyError('Key "a" is new. Other fields present: "{\'b\': "1"}"\nDid you mean "b"?'),
            'Key "a" is new. Did you mean "b"?',
        ),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
    ],
    ids=repr,
)
def test_a_sentence_is_one_line(error, expected):
    assert cli.sentence(error) == expected


class OfTheCompiler(RuntimeError):
    __module__ = "jaxlib.xla"


class Unraisable:
    """Raises when it goes, where Python can only report it."""

    def __init__(self, text: str):
        self.text = text

    def __del__(self):
        raise RuntimeError(self.text)


class TestEnd:
    @pytest.mark.smoke
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (ConfigError("wrong"), cli.USAGE_ERROR),
            (ValueError("wrong"), cli.USAGE_ERROR),
            (CheckpointError("wrong"), cli.RUN_ERROR),
            (OSError("wrong"), cli.RUN_ERROR),
        ],
        ids=repr,
    )
    def test_expected_errors_are_a_sentence_and_a_code(self, error, code, capsys):
        with pytest.raises(SystemExit) as end, cli.fail_in_one_sentence("/path/to/program.py"):
            raise error
        assert end.value.code == code
        assert capsys.readouterr().err == "program.py: wrong\n"

    @pytest.mark.parametrize(
        "error", [TypeError("a bug"), AssertionError("a bug"), OfTheCompiler("a bug")], ids=repr
    )
    def test_bugs_keep_their_trace(self, error):
        with pytest.raises(type(error)), cli.fail_in_one_sentence("program.py"):
            raise error

    def test_a_verbose_run_keeps_the_trace(self, monkeypatch):
        monkeypatch.setattr(cli.flags, "FLAGS", types.SimpleNamespace(is_parsed=lambda: True, verbosity=0))
        with pytest.raises(ValueError, match="wrong"), cli.fail_in_one_sentence("program.py"):
            raise ValueError("wrong")

    def test_a_good_end_is_silent(self, capsys):
        with cli.fail_in_one_sentence("program.py"):
            pass
        assert capsys.readouterr() == ("", "")

    def test_calls_to_an_ended_event_loop_are_not_shown(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # and pytest's again in the end
        with cli.fail_in_one_sentence("program.py"):
            for text in ("Event loop is closed", "something else"):
                Unraisable(text)  # and gone at once
        told = capsys.readouterr().err
        assert "something else" in told and "Event loop" not in told
