"""Options of the data pipeline, as plain values that a command line can set."""

import dataclasses
import os

PACKINGS = ("concatenate", "truncate")
SOURCE_KINDS = ("local", "tfds", "problems")
TOKENIZER_KINDS = ("bytes", "sentencepiece", "hf")
MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches [batch_size, sequence_length]."""

    # or "local:PATH or GLOB", "tfds:NAME[/CONFIG][:VERSION][?feature=F]", "problems:NAME[(OPTION=VALUE, ..)]"
    source: str = "local:stdlib"
    split: str = "train"  # training split; slices such as "train[:90%]" work for every source but problems
    eval_split: str = "validation"
    data_dir: str | None = None  # prepared data; None means $TFDS_DATA_DIR, else "runs/data"
    tokenizer: str = "bytes"  # "bytes", "sentencepiece:FILE", "hf:FILE[?bos=PIECE&eos=PIECE&pad=PIECE]"
    sequence_length: int = 512  # tokens per row
    batch_size: int = 16  # rows of the global batch, over all processes
    packing: str = "concatenate"  # or "truncate": one document per row, its first sequence_length tokens
    seed: int = 0  # order of the documents
    prefetch: int = 2  # batches made ahead of time by a thread; 0 makes each when it is asked for
    isolate_documents: bool = True  # False: one segment per row, so attention crosses document borders
    learn_after: str = (
        ""  # targets up to and with the first such text of a document weigh 0; without it, all count
    )
    workers: int = 0  # processes that read and tokenise, 0 for this one alone; the batches are the same

    def validate(self) -> "DataConfig":
        """Return self, or raise ValueError with one sentence about the first bad value."""
        for name, least in (("sequence_length", 1), ("batch_size", 1), ("prefetch", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed} must lie in 0..{MAX_SEED}.")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing={self.packing!r} must be one of {', '.join(PACKINGS)}.")
        for name, kinds in (("source", SOURCE_KINDS), ("tokenizer", TOKENIZER_KINDS)):
            if getattr(self, name).partition(":")[0] not in kinds:
                raise ValueError(f"{name}={getattr(self, name)!r} must begin with one of {', '.join(kinds)}.")
        for name in ("split", "eval_split"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name a split such as 'train' or 'train[:90%]'.")
        return self


def data_directory(data_dir: str | os.PathLike | None) -> str:
    """The folder of prepared data: the one given, else $TFDS_DATA_DIR, else runs/data."""
    return os.path.expanduser(os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or "runs/data"))
