"""The TFDS dataset "local_text": documents made from any folder, file or glob, without TensorFlow."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import tensorflow_datasets as tfds

from attnlab.data.local_files import Span, assign_splits, find_files, fingerprint


@dataclasses.dataclass(eq=False, kw_only=True)
class LocalTextConfig(tfds.core.BuilderConfig):
    """`name` holds the fingerprint of the files, so changed files are other data in another folder."""

    spans: Mapping[str, Sequence[Span]] = dataclasses.field(default_factory=dict, repr=False)


class LocalText(tfds.core.GeneratorBasedBuilder):
    """Features: text, the file's exact bytes (a tokeniser that needs characters decodes them), and name."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded, so there are no checksums to look for beside this file

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "name": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        spans = self.builder_config.spans
        return {split: self._generate_examples(spans[split]) for split in spans if spans[split]}

    def _generate_examples(self, spans: Sequence[Span]) -> Iterator[tuple[bytes, dict[str, bytes]]]:
        for span in spans:
            for name, text in span.documents():
                yield name, {"text": text, "name": name}


def local_text_config(source: str) -> LocalTextConfig:
    """Look at the files of `source` ("stdlib", a folder, a file or a glob) and describe their dataset."""
    files = find_files(source)
    label = re.sub(r"[^A-Za-z0-9]+", "_", os.path.basename(source.rstrip("/"))).strip("_") or "text"
    return LocalTextConfig(name=f"{label}-{fingerprint(files)}", spans=assign_splits(files))
