"""What an experiment fills in of the auxiliary streams, and that a run cannot go on with others."""

import dataclasses

import pytest

import attnlab.attention.sourced  # noqa: F401 (registers kinds)
from attnlab.config import ConfigError, Experiment, from_config_dict, to_config_dict, to_dict
from attnlab.data.config import DataConfig
from attnlab.data.tokenizers import open_tokenizer
from attnlab.experiment import check_continues
from attnlab.models.config import ModelConfig
from attnlab.models.streams import StreamConfig
from attnlab.tasks.streams import fill_streams, first_tokens

TOKENIZER = open_tokenizer("bytes")
TEXTS = [b"ab", b"cde", b"f"]
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def model(layers: str, **streams) -> ModelConfig:
    return ModelConfig(layers=layers, streams=StreamConfig(**streams))


def fill(config: ModelConfig, monkeypatch, length=7) -> ModelConfig:
    monkeypatch.setattr("attnlab.tasks.streams.open_source", lambda *args, **kwargs: TEXTS)
    return fill_streams(config, DataConfig(sequence_length=length), TOKENIZER)


def test_the_first_tokens_are_those_of_the_first_documents(monkeypatch):
    want = (BOS, *TOKENIZER.encode("ab"), EOS, BOS, *TOKENIZER.encode("cd"))
    filled = fill(model("fixedseq_qk"), monkeypatch)
    assert filled.streams == StreamConfig(length=7, fixed_tokens=want)
    assert first_tokens(TEXTS, TOKENIZER, 4) == want[:4]
    with pytest.raises(ValueError, match="the training text has 12 tokens, but its stream needs 13"):
        first_tokens(TEXTS, TOKENIZER, 13)


def test_what_is_given_or_not_needed_is_left_alone(monkeypatch):
    given = model("fixedseq_qk", length=9, fixed_tokens=(1, 2))
    assert fill(given, monkeypatch) == given
    assert fill(model("softmax + staticemb_qk"), monkeypatch) == model("softmax + staticemb_qk")
    assert fill(model("rndemb_qk"), monkeypatch).streams == StreamConfig(length=7)


def test_filled_streams_survive_the_config_file():
    experiment = Experiment(model=model("fixedseq_qk", length=3, fixed_tokens=(4, 5, 6)))
    assert from_config_dict(to_dict(experiment)) == experiment
    assert from_config_dict(to_config_dict(experiment)) == experiment


def test_a_run_goes_on_with_its_own_text_only(tmp_path):
    old = Experiment(model=model("fixedseq_qk", length=3, fixed_tokens=(4, 5, 6)))
    check_continues(old, old, tmp_path)
    streams = dataclasses.replace(old.model.streams, fixed_tokens=(4, 5, 7))
    new = dataclasses.replace(old, model=dataclasses.replace(old.model, streams=streams))
    with pytest.raises(ConfigError, match="model.streams.fixed_tokens="):
        check_continues(old, new, tmp_path)
    plain = [
        dataclasses.replace(each, model=model("softmax", length=each.model.streams.length))
        for each in (old, new)
    ]
    check_continues(*plain, tmp_path)
