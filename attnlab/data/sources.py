"""Text sources: a spec such as "local:stdlib" or "tfds:wiki40b/en" becomes a list of documents."""

import contextlib
import io
import os
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import tensorflow_datasets as tfds
from absl import logging

from attnlab.data.config import data_directory
from attnlab.data.local_files import SPLITS
from attnlab.data.local_text import LocalText, local_text_config

FILE_FORMAT = "array_record"  # random access, and no TensorFlow to write or read it


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


def open_source(
    spec: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    *,
    leader: bool = True,
    barrier: Callable[[], None] | None = None,
) -> TextSource:
    """Open a split of a source, preparing it under `data_dir` (see data_directory) when it is not there yet.

    spec: "local:stdlib", "local:PATH or GLOB", or "tfds:NAME[/CONFIG][:VERSION][?feature=NAME]".
    split: a split's name, or a TFDS slice of one such as "train[:90%]".
    barrier: with many processes, a function that returns when all have called it; only the leader prepares
        before it. Without one every process may prepare: the first to finish is kept. Hosts that do not share
        `data_dir` find nothing after the barrier and prepare their own copy.
    Raises ValueError in one sentence for a bad spec, an unknown or empty split, and data that cannot be had.
    """
    if barrier and not leader:
        barrier()
    try:
        builder, feature = _open_builder(spec, Path(data_directory(data_dir)))
    finally:  # even when preparing fails, or the other processes would wait for ever
        if barrier and leader:
            barrier()
    return TextSource(_records(builder, spec, split), feature)


def prepare(make: Callable[[Path], tfds.core.DatasetBuilder], data_dir: Path) -> tfds.core.DatasetBuilder:
    """Return make(data_dir) with its data in place, writing it first if need be.

    Data is written elsewhere and renamed, so a reader never meets half a dataset: a killed process leaves
    only a scratch folder, and of two that prepare at once the second finds the name taken and drops its equal
    copy.
    """
    builder = make(data_dir)
    if _is_written(builder):
        return builder
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=data_dir) as scratch:
        written = make(Path(scratch))
        options = tfds.download.DownloadConfig(try_download_gcs=False)  # those copies have no random access
        written.download_and_prepare(
            download_dir=os.fspath(data_dir / "downloads"), download_config=options, file_format=FILE_FORMAT
        )
        final = Path(builder.data_dir)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(written.data_dir, final)
        except OSError:
            if not _is_written(builder):
                raise
    return make(data_dir)


def _is_written(builder: tfds.core.DatasetBuilder) -> bool:
    return os.path.exists(os.path.join(builder.data_dir, "dataset_info.json"))  # TFDS writes it last


def _open_builder(spec: str, data_dir: Path) -> tuple[tfds.core.DatasetBuilder, str]:
    kind, _, name = spec.partition(":")
    if kind == "local" and name:
        return _open_local(name, data_dir), "text"
    if kind == "tfds" and name:
        return _open_tfds(name, data_dir)
    raise ValueError(
        f"Source {spec!r} must be 'local:stdlib', 'local:PATH' or 'tfds:NAME[/CONFIG][:VERSION]'."
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
    try:
        builder = prepare(lambda at: tfds.builder(name, data_dir=at), data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"TFDS knows no dataset {name!r}: check its name in the TFDS catalogue.") from error
    except Exception as error:  # downloads fail in as many ways as there are hosts and formats
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"TFDS dataset {name!r} is not prepared under {str(data_dir)!r} and could not be "
            f"({type(error).__name__}: {reason}): prepare it where there is a network, with "
            f"file_format={FILE_FORMAT!r}, and copy the folder, or use source='local:stdlib'."
        ) from error
    return builder, _text_feature(builder, name, options.get("feature"))


def _text_feature(builder: tfds.core.DatasetBuilder, name: str, feature: str | None) -> str:
    features = builder.info.features
    texts = [key for key in features if isinstance(features[key], tfds.features.Text)]
    chosen = feature or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    if chosen not in texts:
        wanted = f"has no text feature {feature!r}" if feature else "has no single text feature"
        raise ValueError(f"TFDS dataset {name!r} {wanted}: add ?feature=NAME, NAME being one of {texts}.")
    return chosen


def _records(builder: tfds.core.DatasetBuilder, spec: str, split: str) -> Sequence[dict]:
    counts = {name: info.num_examples for name, info in builder.info.splits.items()}
    name = split.partition("[")[0]
    if name not in counts and not (spec.startswith("local:") and name in SPLITS):
        raise ValueError(f"Source {spec!r} has no split {split!r}: it has {counts} (split: documents).")
    if name not in counts or not builder.info.splits[split].num_examples:
        raise ValueError(
            f"Split {split!r} of {spec!r} has no documents (it has {counts}): add files, or slice another, "
            "such as 'train[:90%]' and 'train[90%:]'."
        )
    try:
        return builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"Source {spec!r} is prepared at {builder.data_dir!r} as {builder.info.file_format.value}, which has no "
            f"random access: move it away or give another data_dir, so that it is written as {FILE_FORMAT}."
        ) from error
