"""What the command-line programs share: the config flag, and errors told in one sentence instead of a traceback."""

import contextlib
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from attnlab.config import check_field

USAGE_ERROR, RUN_ERROR = 2, 1
FATAL_ONLY = -3  # of absl's --verbosity
EXPECTED_ERRORS = (
    ValueError,
    OSError,
    RuntimeError,
)  # told in a sentence; anything else is a bug and shows its trace


def config_flag(name: str, help_text: str) -> flags.FlagHolder:
    """A flag --NAME=FILE.py[:VARIANT] with --NAME.FIELD=VALUE for every field of the file's ConfigDict."""
    holder = config_flags.DEFINE_config_file(name, None, help_text, lock_config=True)
    way_out = f"give an experiment, such as --{name}=configs/quickstart.py"
    flags.register_validator(name, lambda value: value is not None, way_out)
    return holder


def parse_flags(argv: list[str]) -> list[str]:
    """Parse, and on a mistake print one sentence and exit with code 2. For `app.run(flags_parser=...)`."""
    try:
        _check_fields(argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"argument {rest[1]!r} is not understood; options are written --name=value")
        for name in flags.FLAGS:
            _check_loaded(flags.FLAGS[name])
        # Libraries log every file they touch, and the errors that they also raise; --verbosity=0 shows it.
        if not flags.FLAGS["verbosity"].present:
            flags.FLAGS.verbosity = FATAL_ONLY
        return rest
    except Exception as error:  # config files are programs: they can raise anything
        quit_with(argv[0], _with_place(error, argv), USAGE_ERROR)


def _check_fields(argv: list[str]) -> None:
    """ConfigError for --NAME.FIELD that the experiment does not have; the flag library would list all its fields."""
    for argument in argv[1:]:
        name, _, field = argument.partition("=")[0].lstrip("-").partition(".")
        # Without a dash it is the value of the flag before.
        if argument.startswith("-") and field and name in flags.FLAGS:
            check_field(field)


def _with_place(error: Exception, argv: list[str]) -> Exception:
    """The error, told with the line of the config file that raised it if one did."""
    # The flag library quotes the trace of what it caught.
    while "Traceback" in str(error) and error.__context__:
        error = error.__context__
    given = {argument.rpartition("=")[2].partition(":")[0] for argument in argv[1:]}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in given]
    if not frames:
        return error
    return flags.Error(f"{frames[-1].filename} line {frames[-1].lineno}: {sentence(error)}")


def _check_loaded(flag: flags.Flag) -> None:
    """Config flags keep a failure to load their file until a field is read: raise it now."""
    if hasattr(flag, "config_filename") and not isinstance(flag.value, ConfigDict):
        name = flag.config_filename.partition(":")[0]
        if not Path(name).exists():
            raise flags.Error(f"config file {name} does not exist; the ready ones are in configs/")
        try:
            _ = flag.value.any_field
        except OSError as error:
            raise (error.__cause__ or error) from error


def default_workdir(name: str) -> Path:
    """runs/quickstart for --NAME=configs/quickstart.py, runs/quickstart-smoke for its smoke form."""
    file, _, variant = flags.FLAGS[name].config_filename.partition(":")
    return Path("runs") / "-".join([Path(file).stem, *([variant] if variant else [])])


def check_workdir(workdir: Path) -> Path:
    """`workdir` itself if it is a folder or can become one; ValueError if a file is in the way."""
    for path in (workdir, *workdir.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"--workdir={workdir} cannot be a folder, as {path} is a file; give another one")
    return workdir


def sentence(error: BaseException) -> str:
    """The message of an error on one line."""
    inner = error.args[0] if error.args else ""
    if isinstance(inner, KeyError):  # ConfigDict's attribute errors hold one
        return sentence(inner)
    text = str(inner if isinstance(error, KeyError) else error)
    text = re.sub(r'Other fields present: ".*}"', "", text, flags=re.DOTALL)  # all of a ConfigDict
    return " ".join(text.split()) or type(error).__name__


def quit_with(program: str, error: BaseException, code: int) -> None:
    print(f"{Path(program).name}: {sentence(error)}", file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextlib.contextmanager
def fail_in_one_sentence(program: str) -> Iterator[None]:
    """Turn the expected errors of a run into one sentence and a non-zero exit: 2 for bad input, 1 for the rest.

    With --verbosity=0 or more they keep their trace, for whoever has to find where one comes from.
    """
    sys.unraisablehook = _print_unraisable
    try:
        yield
    except EXPECTED_ERRORS as error:
        if type(error).__module__.startswith("jax"):  # errors of the compiler or the runtime need their trace
            raise
        if flags.FLAGS.is_parsed() and flags.FLAGS.verbosity >= 0:
            raise
        quit_with(program, error, USAGE_ERROR if isinstance(error, ValueError) else RUN_ERROR)


def _print_unraisable(failure: "sys.UnraisableHookArgs") -> None:
    """Python's own hook, but for the calls which a failed save's writes make to an event loop that has ended."""
    if str(failure.exc_value) != "Event loop is closed":  # the save's own error is raised, and told
        sys.__unraisablehook__(failure)
