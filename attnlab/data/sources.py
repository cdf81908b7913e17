"""Text sources: a spec such as "local:stdlib", "tfds:wiki40b/en" or "problems:sort" becomes a list of documents."""

import contextlib
import io
import os
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import tensorflow_datasets as tfds
from absl import logging

from attnlab.data.config import data_directory
from attnlab.data.local_text import LocalText, local_text_config
from attnlab.data.prepared import leader_first, prepare, records, tfds_builder
from attnlab.data.problems import ProblemSource, open_problems

GENERATED_SIZE = 1_000_000  # documents of an epoch of generated problems, unless their `size` says otherwise
TEXT_STREAM = 1  # texts are other problems than those that are asked for one by one (stream 0)


class DocumentSource(Protocol):
    """Random access to documents; text may be bytes that are not valid UTF-8."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str | bytes: ...


class TextSource:
    """One split of a prepared TFDS dataset, reduced to its text feature. Picklable."""

    def __init__(self, records: Sequence[dict], feature: str):
        self.records, self.feature = records, feature

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes:
        return self.records[int(index)][self.feature]


class ProblemTexts:
    """Problems of one split and level as documents, question and solution joined. Picklable."""

    def __init__(self, problems: ProblemSource):
        self.problems = problems

    def __len__(self) -> int:
        return self.problems.finite or GENERATED_SIZE

    def __getitem__(self, index: int) -> str:
        problem = self.problems.at(int(index))
        return problem.question + problem.solution


def open_source(
    spec: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    *,
    leader: bool = True,
    barrier: Callable[[], None] | None = None,
) -> DocumentSource:
    """Open a split of a source, preparing it under `data_dir` (see data_directory) when it is not there yet.

    spec: "local:stdlib", "local:PATH or GLOB", "tfds:NAME[/CONFIG][:VERSION][?feature=NAME]", or
        "problems:NAME(level=3, size=1000, ..)", solved problems made as they are read (see attnlab.data.problems).
    split: a split's name, or a TFDS slice of one such as "train[:90%]"; "train" or "test" of problems.
    barrier: with many processes, a function that returns when all have called it; only the leader prepares
        before it. Without one every process may prepare: the first to finish is kept. Hosts that do not share
        `data_dir` find nothing after the barrier and prepare their own copy.
    Raises ValueError in one sentence for a bad spec, an unknown or empty split, and data that cannot be had.
    """
    with leader_first(leader, barrier):
        if spec.startswith("problems:"):
            return ProblemTexts(open_problems(spec, split, stream=TEXT_STREAM))
        builder, feature = _open_builder(spec, Path(data_directory(data_dir)))
    return TextSource(records(builder, spec, split), feature)


def _open_builder(spec: str, data_dir: Path) -> tuple[tfds.core.DatasetBuilder, str]:
    kind, _, name = spec.partition(":")
    if kind == "local" and name:
        return _open_local(name, data_dir), "text"
    if kind == "tfds" and name:
        return _open_tfds(name, data_dir)
    raise ValueError(
        f"Source {spec!r} must be 'local:stdlib', 'local:PATH', 'tfds:NAME[/CONFIG][:VERSION]' or 'problems:NAME'."
    )


def _open_local(source: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    config = local_text_config(source)
    folder = data_dir / LocalText.name / config.name / str(LocalText.VERSION)
    if not folder.exists():
        with _quiet():
            prepare(lambda at: LocalText(config=config, data_dir=at), data_dir)
    return tfds.builder_from_directory(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's banner, warnings and nested progress bars, which outlast the seconds that local files take."""
    silence, verbosity = io.StringIO(), logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _open_tfds(spec: str, data_dir: Path) -> tuple[tfds.core.DatasetBuilder, str]:
    name, _, query = spec.partition("?")
    options = dict(urllib.parse.parse_qsl(query))
    if set(options) - {"feature"}:
        raise ValueError(f"Source 'tfds:{spec}' has options {sorted(options)}: only 'feature' is known.")
    builder = tfds_builder(name, data_dir)
    return builder, _text_feature(builder, name, options.get("feature"))


def _text_feature(builder: tfds.core.DatasetBuilder, name: str, feature: str | None) -> str:
    features = builder.info.features
    texts = [key for key in features if isinstance(features[key], tfds.features.Text)]
    chosen = feature or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    if chosen not in texts:
        wanted = f"has no text feature {feature!r}" if feature else "has no single text feature"
        raise ValueError(f"TFDS dataset {name!r} {wanted}: add ?feature=NAME, NAME being one of {texts}.")
    return chosen
