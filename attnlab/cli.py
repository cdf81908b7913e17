"""What the command-line programs share: the config flag, and errors told in one sentence instead of a traceback."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

USAGE_ERROR, RUN_ERROR = 2, 1
ERRORS_ONLY = -2  # of absl's --verbosity
EXPECTED_ERRORS = (
    ValueError,
    OSError,
    RuntimeError,
)  # told in a sentence; anything else is a bug and shows its trace


def config_flag(name: str, help_text: str) -> flags.FlagHolder:
    """A flag --NAME=FILE.py[:VARIANT] with --NAME.FIELD=VALUE for every field of the file's ConfigDict."""
    holder = config_flags.DEFINE_config_file(name, None, help_text, lock_config=True)
    flags.mark_flag_as_required(name)
    return holder


def parse_flags(argv: list[str]) -> list[str]:
    """Parse, and on a mistake print one sentence and exit with code 2. For `app.run(flags_parser=...)`."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"argument {rest[1]!r} is not understood; options are written --name=value")
        for name in flags.FLAGS:
            _check_loaded(flags.FLAGS[name])
        if not flags.FLAGS["verbosity"].present:  # libraries log every file they touch; --verbosity=0 shows it
            flags.FLAGS.verbosity = ERRORS_ONLY
        return rest
    except Exception as error:  # config files are programs: they can raise anything
        quit_with(argv[0], error, USAGE_ERROR)


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


def sentence(error: BaseException) -> str:
    """The message of an error on one line."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(str(text).split()) or type(error).__name__


def quit_with(program: str, error: BaseException, code: int) -> None:
    print(f"{Path(program).name}: {sentence(error)}", file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextlib.contextmanager
def fail_in_one_sentence(program: str) -> Iterator[None]:
    """Turn the expected errors of a run into one sentence and a non-zero exit: 2 for bad input, 1 for the rest."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        if type(error).__module__.startswith("jax"):  # errors of the compiler or the runtime need their trace
            raise
        quit_with(program, error, USAGE_ERROR if isinstance(error, ValueError) else RUN_ERROR)
