"""Text in, batches out: TFDS sources, tokenisers, packing and grain loaders. Nothing here knows of models."""

from attnlab.data.config import DataConfig
from attnlab.data.hosts import local_rows, process_rows, to_global
from attnlab.data.loader import make_loader
from attnlab.data.sources import DocumentSource, open_source
from attnlab.data.tokenizers import Tokenizer, open_tokenizer

__all__ = [
    "DataConfig",
    "DocumentSource",
    "Tokenizer",
    "local_rows",
    "make_loader",
    "open_source",
    "open_tokenizer",
    "process_rows",
    "to_global",
]
