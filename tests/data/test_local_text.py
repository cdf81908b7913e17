"""Folders, files and globs become splits of documents: which files, which split, and when they are prepared again."""

import os
import shutil

import pytest

from attnlab.data import local_files, open_source
from attnlab.data.local_files import SPLITS, assign_splits, find_files, split_of


@pytest.fixture
def folder(tmp_path):
    """60 text files in nested folders, beside everything that is not text."""
    root = tmp_path / "books"
    for i in range(60):
        path = root / f"shelf{i % 3}" / f"book{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text of book %d\n" % i * (i + 1))
    (root / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    for name, content in {
        "empty.txt": b"",
        "blank.txt": b" \n\n",
        "picture.png": b"\x89PNG\0\0",
        ".hidden": b"secret",
    }.items():
        (root / name).write_bytes(content)
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("not a document")
    return root


def read_all(source, data_dir):
    texts = {}
    for split in SPLITS:
        documents = open_source(source, split, data_dir)
        texts[split] = sorted(documents[i] for i in range(len(documents)))
    return texts


def test_every_text_file_is_in_exactly_one_split_byte_for_byte(folder, tmp_path):
    texts = read_all(f"local:{folder}", tmp_path / "data")
    expected = [b"text of book %d\n" % i * (i + 1) for i in range(60)] + ["déjà vu".encode("latin-1")]
    assert sorted(sum(texts.values(), [])) == sorted(expected)
    for i in range(60):
        split = split_of(b"shelf%d/book%d.txt" % (i % 3, i))
        assert b"text of book %d\n" % i * (i + 1) in texts[split]


def test_splits_depend_on_the_name_alone(folder, tmp_path):
    names = [b"file%d" % i for i in range(4000)]
    shares = {split: sum(split_of(name) == split for name in names) / 4000 for split in SPLITS}
    assert abs(shares["validation"] - 0.05) < 0.01 and abs(shares["test"] - 0.05) < 0.01
    files = find_files(os.fspath(folder))
    before = {span.name: split for split, spans in assign_splits(files).items() for span in spans}
    after = {span.name: split for split, spans in assign_splits(files[::-2]).items() for span in spans}
    assert len(after) == 31 and after.items() <= before.items()


def test_a_copied_folder_is_not_prepared_again_but_a_changed_one_is(folder, tmp_path):
    data_dir, prepared = tmp_path / "data", tmp_path / "data" / "local_text"
    before = read_all(f"local:{folder}", data_dir)
    (written,) = prepared.glob("*/1.0.0/*train*")
    time = written.stat().st_mtime_ns
    copy = tmp_path / "elsewhere" / "books"
    shutil.copytree(folder, copy)
    os.utime(copy / "latin.txt", (1, 1))
    assert read_all(f"local:{copy}", data_dir) == before
    assert len(list(prepared.iterdir())) == 1 and written.stat().st_mtime_ns == time
    (copy / "shelf0" / "book0.txt").write_bytes(b"text of look 0\n")  # same size
    os.utime(copy / "shelf0" / "book0.txt", (1, 1))
    changed = read_all(f"local:{copy}", data_dir)
    assert b"text of look 0\n" in sum(changed.values(), []) and len(list(prepared.iterdir())) == 2
    (copy / "shelf0" / "book0.txt").rename(copy / "renamed.txt")
    read_all(f"local:{copy}", data_dir)
    assert len(list(prepared.iterdir())) == 3


def test_globs_and_files(folder, tmp_path):
    assert [name for name, _ in find_files(f"{folder}/*/book1?.txt")] == sorted(
        b"shelf%d/book%d.txt" % (i % 3, i) for i in range(10, 20)
    )
    assert len(find_files(f"{folder}/**")) == len(find_files(os.fspath(folder))) == 61
    lone = tmp_path / "one.txt"
    lone.write_bytes(b"".join(b"line %03d\n" % i for i in range(200)))
    texts = read_all(f"local:{lone}", tmp_path / "data")
    assert b"".join(texts[split][0] for split in SPLITS) == lone.read_bytes()
    assert [len(texts[split][0]) // 9 for split in SPLITS] == [181, 10, 9]  # whole lines


def test_long_files_are_cut_at_line_ends_or_between_characters(monkeypatch, tmp_path):
    monkeypatch.setattr(local_files, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "lines").write_bytes(b"".join(b"line %03d\n" % i for i in range(50)))
    (tmp_path / "one_line").write_bytes("aé日🎉".encode() * 50)
    (tmp_path / "no_text").write_bytes(b"\x80" * 250)
    pieces = {}
    for span in assign_splits(find_files(os.fspath(tmp_path)))["train"]:
        pieces[span.name] = [text for _, text in span.documents()]
        assert b"".join(pieces[span.name]) == span.path.read_bytes()
        assert max(map(len, pieces[span.name])) <= 100 and len(pieces[span.name]) < 7 + len(
            pieces[span.name][0]
        )
    assert {len(text) for text in pieces[b"lines"]} == {99, 54}
    assert "".join(text.decode() for text in pieces[b"one_line"]) == "aé日🎉" * 50
    assert len(pieces) == 3


@pytest.mark.smoke
def test_the_standard_library_is_the_default_source(tmp_path):
    sizes, names = {}, set()
    for split in SPLITS:
        source = open_source("local:stdlib", split, tmp_path)
        sizes[split] = sum(len(source[i]) for i in range(len(source)))
        names |= {source.records[i]["name"].partition(b"#")[0] for i in range(len(source))}
    assert {b"argparse.py", b"json/decoder.py"} <= names and all(name.endswith(b".py") for name in names)
    assert not any({b"test", b"site-packages", b"encodings"} & set(name.split(b"/")) for name in names)
    assert 5e6 < sizes["train"] < 2e7 and all(1e5 < sizes[split] < 1e6 for split in SPLITS[1:])


def test_errors_are_sentences(tmp_path):
    def sentence(source, split="train"):
        with pytest.raises(ValueError) as error:
            open_source(source, split, tmp_path / "data")
        return str(error.value)

    (tmp_path / "bare").mkdir()
    (tmp_path / "few").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "few" / "a.bin").write_bytes(b"\0\1\2")
    assert "No file or folder matches" in sentence(f"local:{tmp_path}/nowhere")
    assert "No file or folder matches" in sentence(f"local:{tmp_path}/*.md")
    assert "No readable text" in sentence(f"local:{tmp_path}/bare") and "0 files" in sentence(
        f"local:{tmp_path}/bare"
    )
    assert "1 files, none but empty, blank or binary" in sentence(f"local:{tmp_path}/few")
    assert "No readable text" in sentence(f"local:{tmp_path}/empty")
    for name in ("x.txt", "y.txt"):
        assert split_of(name.encode()) == "train"
        (tmp_path / "few" / name).write_text("words")
    assert "has no split 'dev': it has {'train': 2}" in sentence(f"local:{tmp_path}/few", "dev")
    assert "Split 'test' of" in sentence(f"local:{tmp_path}/few", "test")
    assert "has no documents" in sentence(f"local:{tmp_path}/few", "train[:0%]")
    assert len(open_source(f"local:{tmp_path}/few", "train[:50%]", tmp_path / "data")) == 1
