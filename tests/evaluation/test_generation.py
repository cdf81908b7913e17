"""Text samples: reproducible, independent of each other, and decoded as they were drawn."""

import copy
import dataclasses

import numpy as np
import pytest

from attnlab.evaluation import generation, run
from attnlab.evaluation.generation import encode_prompt, sample_texts
from tests.evaluation import small


@pytest.fixture(scope="module")
def context():
    return small.context([b"unused"], sample_prompt="ab", sample_tokens=9, samples=3, temperature=1.0)


def test_samples_are_text_after_the_prompt(context):
    result = run("generate", context)
    assert len(result.rows) == result.scalars["samples"] == 3
    for row in result.rows:
        assert row["prompt"] == "ab" and 1 <= row["tokens"] <= 9
        assert row["finished"] or row["tokens"] == 9
        assert row["model_logprob"] < 0
        assert f"ab{row['text']}" in result.text
    assert len({row["text"] for row in result.rows}) > 1, "each sample has its own key"
    total = sum(row["model_logprob"] for row in result.rows) / sum(row["tokens"] for row in result.rows)
    np.testing.assert_allclose(result.scalars["model_loss"], -total)
    assert run("generate", context).rows == result.rows
    assert run("generate", small.with_eval(context, sample_seed=1)).rows != result.rows


def test_a_sample_does_not_depend_on_longer_prompts_beside_it(context):
    first = run("generate", context).rows[0]
    beside = sample_texts(context, ["ab", "a much longer prompt"], context.experiment.eval)[0]
    assert (beside.text, beside.tokens) == (first["text"], first["tokens"])
    np.testing.assert_allclose(beside.logprob, first["logprob"], rtol=1e-4)


def test_a_sample_ends_with_eos(context):
    """The id that the first sample happens to draw fourth is declared the end of documents."""
    config = context.experiment.eval
    encoded = [encode_prompt(small.TOKENIZER, "ab")]
    drawn = generation._generate(context, encoded * 3, config).tokens[0]
    tokenizer = copy.copy(small.TOKENIZER)
    tokenizer.eos_id = int(drawn[3])
    first = sample_texts(dataclasses.replace(context, tokenizer=tokenizer), ["ab"] * 3, config)[0]
    assert (drawn < small.TOKENIZER.vocab_size).all(), "the model has more ids than the tokeniser"
    assert first.finished and first.tokens == 1 + drawn.tolist().index(tokenizer.eos_id)


def test_prompts_begin_a_document():
    assert encode_prompt(small.TOKENIZER, "ab").tolist() == [256, 97, 98]
    assert encode_prompt(small.TOKENIZER, "").tolist() == [256]


def test_a_prompt_that_does_not_fit_is_refused(context):
    with pytest.raises(
        ValueError, match="prompt of 3 tokens and 9 new ones need 12 positions, above the limit of 11"
    ):
        run("generate", small.with_eval(context, sample_max_length=11))
