"""The manifest of a checkpoint folder: which files belong to it, how long they are, and their checksums.

`write` is called once the folder is complete; `find_damage` compares the folder with its manifest later and
answers in words. CRC-32 is enough here: it finds truncation, lost pages and flipped bits, not an attacker.
"""

from __future__ import annotations

import concurrent.futures
import json
import zlib
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

NAME = "manifest.json"
Verify = Literal["hash", "size"]

_CHUNK = 8 << 20  # bytes read at a time
_THREADS = 8  # zlib.crc32 works outside the interpreter lock


class ManifestError(ValueError):
    """The manifest is there but cannot be read."""


def write(folder: epath.Path, *, step: int, metrics: Mapping[str, float], verify: Verify) -> None:
    """Lists every file of the folder in `manifest.json`; the file appears whole or not at all.

    `metrics` are kept with it (what the step was worth). verify="size" leaves the checksums out.
    Raises OSError if the folder cannot be read or written.
    """
    names = _file_names(folder)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda name: _entry(folder / name, verify), names))
    content = {"step": step, "metrics": dict(metrics), "files": dict(zip(names, entries, strict=True))}
    temporary = folder / f"{NAME}.tmp"
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True))
    temporary.replace(folder / NAME)


def read(folder: epath.Path) -> dict[str, Any] | None:
    """The manifest as written, or None where there is none; ManifestError if it is not a manifest."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if not all(isinstance(content[key], dict) for key in ("metrics", "files")):
            raise TypeError("not a manifest")
        return content
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{NAME} is unreadable ({error})") from error


def find_damage(folder: epath.Path, verify: Verify) -> str | None:
    """What is wrong with the folder, naming the file, or None if it matches its manifest (or has none).

    Sizes are compared first since that costs nothing; with verify="hash" every byte is then read.
    """
    try:
        content = read(folder)
        if content is None:
            return None
        files = content["files"]
        for name, entry in files.items():
            if reason := _wrong_size(folder / name, name, entry["size"]):
                return reason
        return _wrong_checksum(folder, files) if verify == "hash" else None
    except ManifestError as error:
        return str(error)
    except (OSError, KeyError, TypeError) as error:
        return f"the folder cannot be compared with {NAME} ({error!r})"


def _wrong_size(path: epath.Path, name: str, size: int) -> str | None:
    if not path.exists():
        return f"file {name} is missing"
    found = path.stat().length
    return None if found == size else f"file {name} has {found} bytes instead of {size}"


def _wrong_checksum(folder: epath.Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    hashed = {name: entry["crc32"] for name, entry in files.items() if "crc32" in entry}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _crc32(folder / name), hashed)
        for name, crc in zip(hashed, found, strict=True):
            if crc != hashed[name]:
                return f"file {name} has checksum {crc} instead of {hashed[name]}"
    return None


def _entry(path: epath.Path, verify: Verify) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": path.stat().length}
    if verify == "hash":
        entry["crc32"] = _crc32(path)
    return entry


def _crc32(path: epath.Path) -> str:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _file_names(folder: epath.Path, prefix: str = "") -> list[str]:
    """Every file below the folder as "a/b/c", sorted, the manifest and its temporary form excepted."""
    names = []
    for path in sorted(folder.iterdir()):
        name = f"{prefix}{path.name}"
        if path.is_dir():
            names += _file_names(path, f"{name}/")
        elif not name.startswith(NAME):
            names.append(name)
    return names
