"""TFDS datasets on disk: written once, in a format with random access, whoever asks first.

Nothing here knows what the records are for; `sources` takes texts of them, `problems` takes questions and answers.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from attnlab.data.local_files import SPLITS

FILE_FORMAT = "array_record"  # random access, and no TensorFlow to write or read it


@contextlib.contextmanager
def leader_first(leader: bool, barrier: Callable[[], None] | None) -> Iterator[None]:
    """What is inside runs in the leader before, and in the other processes after, all have met at the barrier."""
    if barrier and not leader:
        barrier()
    try:
        yield
    finally:  # even when preparing fails, or the other processes would wait for ever
        if barrier and leader:
            barrier()


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


def tfds_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """The prepared dataset "NAME[/CONFIG][:VERSION]"; ValueError in one sentence if it cannot be had."""
    try:
        return prepare(lambda at: tfds.builder(name, data_dir=at), data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"TFDS knows no dataset {name!r}: check its name in the TFDS catalogue.") from error
    except Exception as error:  # downloads fail in as many ways as there are hosts and formats
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"TFDS dataset {name!r} is not prepared under {str(data_dir)!r} and could not be "
            f"({type(error).__name__}: {reason}): prepare it where there is a network, with "
            f"file_format={FILE_FORMAT!r}, and copy the folder, or use source='local:stdlib'."
        ) from error


def records(builder: tfds.core.DatasetBuilder, spec: str, split: str) -> Sequence[dict]:
    """Random access to the records of a split or slice; ValueError if it is unknown or empty, or cannot be read so."""
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
