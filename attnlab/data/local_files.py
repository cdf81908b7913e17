"""Which of the user's files are text, how they are cut into documents, and which split each belongs to."""

import dataclasses
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

SPLITS = ("train", "validation", "test")
# Longer files are cut at line ends, so that neither a record nor its tokens (4 bytes each) outgrow memory.
MAX_DOCUMENT_BYTES = 1 << 20
# Left out of "stdlib": what is installed beside it, tests (broken on purpose, huge literals, bad encodings)
# and generated tables (character maps, help topics), so that what remains is ordinary code written by people.
STDLIB_EXCLUDED = frozenset(
    ["site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"]
)
_SNIFF_BYTES = 8192


@dataclasses.dataclass(frozen=True)
class Span:
    """The bytes start..stop of a file; `name` is its path relative to the source, equal on every machine."""

    name: bytes
    path: Path
    start: int
    stop: int

    def documents(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (name, raw bytes) of at most MAX_DOCUMENT_BYTES each; joined they are exactly the span."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            while (left := self.stop - (position := file.tell())) > 0:
                block = file.read(min(left, MAX_DOCUMENT_BYTES))
                if not block:
                    raise ValueError(f"{str(self.path)!r} shrank while it was read; start again.")
                if len(block) < left:
                    block = block[: _cut(block)]
                    file.seek(position + len(block))
                yield self.name + b"#%d" % position, block


def find_files(source: str) -> list[tuple[bytes, Path]]:
    """List (relative name, path) of the text files of "stdlib", a folder, a file or a glob, sorted by name.

    Text is any file that is not blank and has no NUL byte in its first 8 KiB; it need not be valid UTF-8.
    Inside folders, names that begin with a dot are passed over and links to folders are not followed.
    Raises ValueError when nothing is there or nothing there is text.
    """
    root, paths = _candidates(source)
    texts = sorted((os.fsencode(path.relative_to(root).as_posix()), path) for path in paths if _is_text(path))
    if not texts:
        raise ValueError(
            f"No readable text in {source!r}: {len(paths)} files, none but empty, blank or binary ones; "
            "name a folder of text files."
        )
    return texts


def assign_splits(files: Sequence[tuple[bytes, Path]]) -> dict[str, list[Span]]:
    """Give every file to one split by the hash of its relative name: about 90, 5 and 5 % of the files.

    A file's split depends on nothing but its name, so adding files moves none and no text is in two splits.
    One file alone is divided by position instead, at line ends near 90 and 95 % of its bytes.
    """
    splits = {split: [] for split in SPLITS}
    if len(files) == 1:
        (name, path), size = files[0], files[0][1].stat().st_size
        borders = [0, _line_end(path, size * 90 // 100), _line_end(path, size * 95 // 100), size]
        for split, start, stop in zip(SPLITS, borders[:-1], borders[1:], strict=True):
            splits[split] += [Span(name, path, start, stop)] if start < stop else []
        return splits
    for name, path in files:
        splits[split_of(name)].append(Span(name, path, 0, path.stat().st_size))
    return splits


def split_of(name: bytes) -> str:
    bucket = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


def fingerprint(files: Sequence[tuple[bytes, Path]]) -> str:
    """Hash of names and contents, not of dates: a copied folder is the same data, an edited one is not."""
    digest = hashlib.blake2b(b"%d" % MAX_DOCUMENT_BYTES, digest_size=8)
    for name, path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.blake2b(name).digest() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def _candidates(source: str) -> tuple[Path, list[Path]]:
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return root, [path for path in _walk(root, STDLIB_EXCLUDED) if path.suffix == ".py"]
    path = Path(source).expanduser()
    if path.is_dir():
        return path, _walk(path)
    if path.is_file():
        return path.parent, [path]
    if glob.has_magic(source):
        paths = [Path(found) for found in glob.glob(os.fspath(path), recursive=True) if os.path.isfile(found)]
        parts = path.parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        if paths:
            return Path(*parts[:fixed]), paths
    raise ValueError(
        f"No file or folder matches {source!r}: give a folder, file or glob that does, or 'stdlib'."
    )


def _walk(root: Path, excluded: frozenset[str] = frozenset()) -> list[Path]:
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    return [path for path in paths if path.is_file()]


def _is_text(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(_SNIFF_BYTES)
    return b"\0" not in head and bool(head.strip() or len(head) == _SNIFF_BYTES)


def _cut(block: bytes) -> int:
    """Where to end a document inside a longer text: after its last line, else before its last character."""
    if end := block.rfind(b"\n") + 1:
        return end
    end = len(block) - 1
    while end > len(block) - 4 and block[end] & 0xC0 == 0x80:  # a UTF-8 character goes on
        end -= 1
    return end


def _line_end(path: Path, position: int) -> int:
    with open(path, "rb") as file:
        file.seek(position)
        file.readline()
        return file.tell()
