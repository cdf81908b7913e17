"""TFDS sources, with small datasets of our own: features, slices, preparing at the same time, and being offline."""

import json
import os
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds

from attnlab.data import open_source


class TinyPoems(tfds.core.GeneratorBasedBuilder):
    """Two text features and a label; `before_writing` is called when preparing has begun."""

    VERSION = tfds.core.Version("2.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="short"), tfds.core.BuilderConfig(name="long")]
    url_infos = None
    before_writing = staticmethod(lambda: None)

    def _info(self):
        features = {
            "title": tfds.features.Text(),
            "text": tfds.features.Text(),
            "year": tfds.features.Scalar(np.int32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            self.before_writing()
            yield i, {"title": f"poem {i}", "text": f"{self.builder_config.name} rosé {i}", "year": i}


class TinyPairs(tfds.core.GeneratorBasedBuilder):
    """Two text features, neither called text."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        features = {"question": tfds.features.Text(), "answer": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": iter([(0, {"question": "why?", "answer": "so."})])}

    def _generate_examples(self):
        raise NotImplementedError


class Unreachable(TinyPairs):
    """A dataset whose download fails."""

    def _split_generators(self, dl_manager):
        raise ConnectionError("no route to\nhost")


def texts(source):
    return sorted(source[i].decode() for i in range(len(source)))


def test_config_version_slice_and_feature_are_honoured(tmp_path):
    expected = sorted(f"short rosé {i}" for i in range(20))
    assert texts(open_source("tfds:tiny_poems", "train", tmp_path)) == expected
    assert texts(open_source("tfds:tiny_poems/short:2.1.0", "train", tmp_path)) == expected
    assert texts(open_source("tfds:tiny_poems/long", "test", tmp_path)) == [
        f"long rosé {i}" for i in range(3)
    ]
    assert texts(open_source("tfds:tiny_poems/long?feature=title", "test", tmp_path))[0] == "poem 0"
    halves = [open_source("tfds:tiny_poems", split, tmp_path) for split in ("train[:25%]", "train[25%:]")]
    assert [len(half) for half in halves] == [5, 15] and sorted(
        texts(halves[0]) + texts(halves[1])
    ) == expected
    assert texts(pickle.loads(pickle.dumps(halves[0]))) == texts(halves[0])


def test_two_that_prepare_at_once_both_read_whole_data(tmp_path, monkeypatch):
    """While the first is writing, a second prepares the same data from beginning to end."""
    seconds = []

    def second():
        if not seconds:
            seconds.append(None)
            seconds[0] = open_source("tfds:tiny_poems", "train", tmp_path)

    monkeypatch.setattr(TinyPoems, "before_writing", staticmethod(second))
    first = open_source("tfds:tiny_poems", "train", tmp_path)
    assert len(first) == len(seconds[0]) == 20 and texts(first) == texts(seconds[0])
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".preparing")]


def test_an_interrupted_preparation_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    calls = []

    def interrupt():
        calls.append(None)
        if len(calls) == 11:
            raise KeyboardInterrupt

    monkeypatch.setattr(TinyPoems, "before_writing", staticmethod(interrupt))
    with pytest.raises(KeyboardInterrupt):
        open_source("tfds:tiny_poems", "train", tmp_path)
    assert not (tmp_path / "tiny_poems").exists()
    (tmp_path / ".preparing-killed" / "tiny_poems" / "short" / "2.1.0").mkdir(parents=True)
    assert len(open_source("tfds:tiny_poems", "train", tmp_path)) == 20


def test_the_leader_prepares_before_the_barrier_and_the_others_after_it(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(TinyPoems, "before_writing", staticmethod(lambda: events.append("write")))

    def barrier():
        events.append("barrier")

    for leader, data_dir, expected in (
        (True, "shared", ["write"] * 23 + ["barrier"]),
        (False, "shared", ["barrier"]),
        (False, "own disk", ["barrier"] + ["write"] * 23),
    ):
        events.clear()
        assert (
            len(open_source("tfds:tiny_poems", "train", tmp_path / data_dir, leader=leader, barrier=barrier))
            == 20
        )
        assert events == expected
    events.clear()
    with pytest.raises(ValueError):
        open_source("tfds:unreachable", "train", tmp_path, barrier=barrier)
    assert events == ["barrier"]


def test_data_dir_defaults_to_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", os.fspath(tmp_path / "from_environment"))
    open_source("tfds:tiny_poems", "test")
    assert (tmp_path / "from_environment" / "tiny_poems" / "short" / "2.1.0").is_dir()
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.chdir(tmp_path)
    open_source("tfds:tiny_poems", "test")
    assert (tmp_path / "runs" / "data" / "tiny_poems").is_dir()


def test_errors_name_the_dataset_and_the_way_out(tmp_path):
    def sentence(spec, split="train"):
        with pytest.raises(ValueError) as error:
            open_source(spec, split, tmp_path)
        return str(error.value)

    assert sentence("tfds:unreachable").startswith("TFDS dataset 'unreachable' is not prepared under")
    assert "(ConnectionError: no route to host): prepare it where there is a network" in sentence(
        "tfds:unreachable"
    )
    assert sentence("tfds:no_such_thing").startswith("TFDS knows no dataset 'no_such_thing'")
    assert "add ?feature=NAME, NAME being one of ['question', 'answer']" in sentence("tfds:tiny_pairs")
    assert "has no text feature 'year'" in sentence("tfds:tiny_poems?feature=year")
    assert "only 'feature' is known" in sentence("tfds:tiny_poems?key=year")
    assert "has no split 'validation': it has {'train': 20, 'test': 3}" in sentence(
        "tfds:tiny_poems", "validation"
    )
    for spec in ("wiki", "local:", "tfds:"):
        assert f"Source {spec!r} must be 'local:stdlib'" in sentence(spec)


def test_data_prepared_in_a_format_without_random_access_is_refused(tmp_path):
    open_source("tfds:tiny_pairs?feature=answer", "train", tmp_path)
    info = tmp_path / "tiny_pairs" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="as tfrecord, which has no random access: move it away"):
        open_source("tfds:tiny_pairs?feature=answer", "train", tmp_path)
