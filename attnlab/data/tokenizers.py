"""Tokenisers: bytes, SentencePiece models and Hugging Face tokenizer.json files behind one small contract.

A document of n text tokens is trained on as [BOS] + tokens + [EOS]; `encode` returns the n tokens alone.
Byte counts let perplexities of different tokenisers be compared as bits per byte.
"""

import hashlib
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers


class Tokenizer(Protocol):
    """vocab_size bounds every id. pad_id marks places that are never a visible input nor a counted target."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str  # equal fingerprints give equal ids

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the text's ids, int32 [n], without BOS or EOS."""
        ...

    def encode_with_bytes(self, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32 [n], UTF-8 bytes that each id and the closing EOS account for, float32 [n + 1]).

        The counts add up to the text's bytes exactly. A character split over several ids counts for the id
        whose offset ends it; bytes that no id covers, such as trailing spaces that the tokeniser drops, count
        for EOS.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids; BOS, EOS and padding have none, and broken UTF-8 becomes U+FFFD."""
        ...


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 BOS, 257 EOS, 258 padding; 259..263 are unused.

    264 ids rather than 259 so that the embedding divides over 2, 4 or 8 devices. Text that is not valid UTF-8
    keeps its bytes.
    """

    vocab_size, bos_id, eos_id, pad_id = 264, 256, 257, 258
    fingerprint = "bytes-264"

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_with_bytes(self, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        counts = np.ones(len(ids) + 1, np.float32)
        counts[-1] = 0.0
        return ids, counts

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64).reshape(-1)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model with BOS and EOS; without a padding piece, padding is EOS (nothing sees it)."""

    def __init__(self, path: str | Path):
        self.fingerprint = f"sentencepiece-{_file_digest(path)}"
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        for name, token in (("BOS", self.bos_id), ("EOS", self.eos_id)):
            if token < 0:
                raise ValueError(
                    f"SentencePiece model {str(path)!r} has no {name}: train it with bos_id and eos_id."
                )
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.asarray(self._model.encode(as_text(text)), np.int32)

    def encode_with_bytes(self, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
        text = as_text(text)
        pieces = self._model.encode(text, return_type="proto").pieces  # offsets are in bytes of the raw text
        ids = np.array([piece.id for piece in pieces], np.int32)
        ends = np.array([piece.end for piece in pieces], np.int64)
        return ids, _shares(ends, len(text.encode("utf-8")))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        special = (self.bos_id, self.eos_id, self.pad_id)
        return self._model.decode(
            [int(token) for token in np.asarray(ids).reshape(-1) if token not in special]
        )


class HFTokenizer:
    """A Hugging Face tokenizer.json; without a padding piece, padding reuses EOS (nothing sees it).

    The file does not say which pieces begin and end a text: those given do, else the first of NAMES it has.
    """

    NAMES = {
        "bos": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
        "eos": ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>"),
        "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    }

    def __init__(
        self, path: str | Path, *, bos: str | None = None, eos: str | None = None, pad: str | None = None
    ):
        digest = _file_digest(path)
        self._model = tokenizers.Tokenizer.from_file(str(path))
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # "</s>" inside a text is text
        self.vocab_size = 1 + max(self._model.get_vocab().values())  # ids may have gaps
        self.bos_id, self.eos_id = self._special(path, "bos", bos), self._special(path, "eos", eos)
        has_pad = pad or any(self._model.token_to_id(name) is not None for name in self.NAMES["pad"])
        self.pad_id = self._special(path, "pad", pad) if has_pad else self.eos_id
        self.fingerprint = f"hf-{digest}-{self.bos_id}-{self.eos_id}"

    def _special(self, path: str | Path, role: str, name: str | None) -> int:
        names = (name,) if name else self.NAMES[role]
        found = [token for piece in names if (token := self._model.token_to_id(piece)) is not None]
        if not found:
            raise ValueError(
                f"Tokeniser {str(path)!r} has no {role.upper()} among {', '.join(names)}: "
                f"name its piece, 'hf:FILE?{role}=PIECE'."
            )
        return found[0]

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.asarray(self._model.encode(as_text(text), add_special_tokens=False).ids, np.int32)

    def encode_with_bytes(self, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
        text = as_text(text)
        encoding = self._model.encode(text, add_special_tokens=False)
        ends = np.array([end for _, end in encoding.offsets], np.int64)  # in characters
        positions = _byte_positions(text)
        return np.asarray(encoding.ids, np.int32), _shares(positions[ends], positions[-1])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        special = (self.bos_id, self.eos_id, self.pad_id)
        kept = [int(token) for token in np.asarray(ids).reshape(-1) if token not in special]
        return self._model.decode(kept, skip_special_tokens=False)


def open_tokenizer(spec: str) -> Tokenizer:
    """Open "bytes", "sentencepiece:FILE" or "hf:FILE[?bos=PIECE&eos=PIECE&pad=PIECE]".

    Raises ValueError for any other spec, a missing file, and a model without BOS or EOS.
    """
    kind, _, file = spec.partition(":")
    if spec == "bytes":
        return ByteTokenizer()
    if kind == "sentencepiece" and file:
        return SentencePieceTokenizer(Path(file).expanduser())
    if kind == "hf" and file:
        file, _, query = file.partition("?")
        options = dict(urllib.parse.parse_qsl(query))
        if unknown := set(options) - {"bos", "eos", "pad"}:
            raise ValueError(
                f"Tokeniser {spec!r} has unknown options {sorted(unknown)}: only bos, eos, pad are known."
            )
        return HFTokenizer(Path(file).expanduser(), **options)
    raise ValueError(f"Tokeniser {spec!r} must be 'bytes', 'sentencepiece:FILE' or 'hf:FILE'.")


def as_text(text: str | bytes) -> str:
    """The text that tokenisers of characters read: bytes that are not valid UTF-8 become U+FFFD."""
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text


def _file_digest(path: str | Path) -> str:
    if not Path(path).is_file():
        raise ValueError(f"No tokeniser file at {str(path)!r}: give the path of a trained model.")
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def _byte_positions(text: str) -> np.ndarray:
    """Byte offset of every character of text and of its end, [len(text) + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
    widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])


def _shares(ends: np.ndarray, total: int) -> np.ndarray:
    """Bytes between successive token ends, then what is left for EOS; an end that steps back counts 0."""
    reached = np.maximum.accumulate(np.concatenate([[0], ends]))
    return np.diff(np.append(reached, total)).astype(np.float32)
