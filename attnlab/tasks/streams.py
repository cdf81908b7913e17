"""What a model's auxiliary streams take from the data."""

import dataclasses
import functools

from attnlab.data.config import DataConfig
from attnlab.data.packing import EncodedDocuments
from attnlab.data.sources import DocumentSource, open_source
from attnlab.data.tokenizers import Tokenizer
from attnlab.models.config import ModelConfig
from attnlab.training import multihost


def fill_streams(model: ModelConfig, data: DataConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model with what its auxiliary streams lack: a length, and the first tokens of the training text.

    Nothing is read for models without a text stream. ValueError if the text is shorter than the stream.
    """
    named, streams = model.auxiliary(), model.streams
    if not named:
        return model
    streams = dataclasses.replace(streams, length=streams.length or data.sequence_length)
    if "text" in named and not streams.fixed_tokens:
        source = open_split(data, data.split, "fixed text")
        streams = dataclasses.replace(streams, fixed_tokens=first_tokens(source, tokenizer, streams.length))
    return dataclasses.replace(model, streams=streams)


def first_tokens(source: DocumentSource, tokenizer: Tokenizer, count: int) -> tuple[int, ...]:
    """The first `count` tokens of the documents in the source's own order, with BOS and EOS; ValueError if fewer."""
    documents, found = EncodedDocuments(source, tokenizer), []
    for index in range(len(documents)):
        found += documents[index].tokens.tolist()
        if len(found) >= count:
            return tuple(found[:count])
    raise ValueError(
        f"the training text has {len(found)} tokens, but its stream needs {count}; lower model.streams.length"
    )


def open_split(data: DataConfig, split: str, what: str) -> DocumentSource:
    """A split, prepared by process 0 first; collective over all processes."""
    return open_source(
        data.source,
        split,
        data.data_dir,
        leader=multihost.is_main(),
        barrier=functools.partial(multihost.barrier, f"{what} {split}"),
    )
