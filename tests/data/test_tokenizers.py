"""Round trips, special tokens and byte counts of real tokenisers, trained here on a few lines."""

import numpy as np
import pytest
import sentencepiece
import tokenizers

from attnlab.data import open_tokenizer

LINES = [
    "def add(x, y):\n    return x + y\n",
    "naïve café, größer, 日本語のテキスト\n",
    "to be  or not to be 🎉\n",
] * 40
TEXTS = [
    "",
    "a",
    " ",
    "def add(x):\n\treturn  x\n\n",
    "naïve 日本語 🎉🎉 Ω\n",
    "to be or not to be   ",
    "<s> </s> <pad>",
]


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    shared = {
        "sentence_iterator": iter(LINES),
        "vocab_size": 330,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    train = sentencepiece.SentencePieceTrainer.train
    train(model_prefix=f"{folder}/exact", **shared, **exact, pad_id=3)
    train(model_prefix=f"{folder}/nfkc", **shared | {"sentence_iterator": iter(LINES), "vocab_size": 90})
    train(
        model_prefix=f"{folder}/bare",
        **shared | {"sentence_iterator": iter(LINES), "vocab_size": 90},
        eos_id=-1,
    )
    for name, special in (
        ("hf", ["<s>", "</s>", "<pad>"]),
        ("gpt", ["<|endoftext|>"]),
        ("odd", ["<go>", "<stop>"]),
    ):
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet
        )
        model.train_from_iterator(LINES, trainer)
        model.enable_truncation(4)
        model.save(f"{folder}/{name}.json")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "to": 2, "be": 9}, unk_token="<s>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(f"{folder}/words.json")
    return {
        "bytes": "bytes",
        "exact": f"sentencepiece:{folder}/exact.model",
        "nfkc": f"sentencepiece:{folder}/nfkc.model",
        "bare": f"sentencepiece:{folder}/bare.model",
        "hf": f"hf:{folder}/hf.json",
        "gpt": f"hf:{folder}/gpt.json",
        "odd": f"hf:{folder}/odd.json?bos=<go>&eos=<stop>",
        "odd_unsaid": f"hf:{folder}/odd.json",
        "words": f"hf:{folder}/words.json",
    }


@pytest.mark.parametrize("name", ["bytes", "exact", "hf", "gpt", "odd"])
def test_round_trip_with_and_without_special_ids(specs, name):
    tokenizer = open_tokenizer(specs[name])
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1 and ids.max(initial=0) < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == text
        np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
        for special in (tokenizer.bos_id, tokenizer.eos_id):
            assert special not in ids, "special pieces inside a text are text"


@pytest.mark.parametrize("name", ["bytes", "exact", "nfkc", "hf", "gpt", "words"])
def test_byte_counts_add_up_to_the_text(specs, name):
    tokenizer = open_tokenizer(specs[name])
    for text in [*TEXTS, "to be\n\n", "  be  ", "\n", "Ω" * 9, "ﬁve ①"]:
        ids, counts = tokenizer.encode_with_bytes(text)
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert counts.dtype == np.float32 and counts.shape == (len(ids) + 1,) and (counts >= 0).all()
        assert counts.sum() == len(text.encode())


@pytest.mark.parametrize("name", ["exact", "hf"])
def test_byte_counts_belong_to_their_token(specs, name):
    """What the first k ids decode to has as many bytes as their counts say, wherever no character is cut."""
    tokenizer, text = open_tokenizer(specs[name]), "return naïve 日本語 x\n"
    ids, counts = tokenizer.encode_with_bytes(text)
    whole = 0
    for k in range(len(ids) + 1):
        prefix = tokenizer.decode(ids[:k])
        if text.startswith(prefix) and k and (k == len(ids) or counts[k]):
            assert counts[:k].sum() == len(prefix.encode()), k
            whole += 1
    assert whole > len(text) // 3 and counts[-1] == 0


def test_byte_ids_are_the_bytes_even_of_broken_text():
    tokenizer = open_tokenizer("bytes")
    broken = b"ab\xff\xc3"
    np.testing.assert_array_equal(tokenizer.encode(broken), [97, 98, 255, 195])
    assert tokenizer.decode(tokenizer.encode(broken)) == "ab\ufffd\ufffd"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (
        256,
        257,
        258,
        264,
    )
    assert tokenizer.decode([104, 263, 105]) == "hi"


@pytest.mark.parametrize("name", ["exact", "hf"])
def test_broken_text_is_replaced_where_characters_are_needed(specs, name):
    tokenizer = open_tokenizer(specs[name])
    np.testing.assert_array_equal(tokenizer.encode(b"ab\xff"), tokenizer.encode("ab\ufffd"))


def test_special_ids_come_from_the_model(specs):
    ids = {name: open_tokenizer(specs[name]) for name in ("exact", "nfkc", "hf", "gpt", "odd", "words")}
    triples = {name: (t.bos_id, t.eos_id, t.pad_id) for name, t in ids.items()}
    assert triples["exact"] == (1, 2, 3) and triples["nfkc"] == (1, 2, 2)
    assert triples["hf"] == (0, 1, 2) and triples["gpt"] == (0, 0, 0) and triples["odd"] == (0, 1, 1)
    assert ids["words"].vocab_size == 10
    assert len({tokenizer.fingerprint for tokenizer in ids.values()} | {"bytes-264"}) == 7


def test_errors_are_sentences(specs, tmp_path):
    for spec, sentence in {
        "morse": "must be 'bytes', 'sentencepiece:FILE' or 'hf:FILE'",
        "hf:": "must be 'bytes'",
        f"hf:{tmp_path}/none.json": "No tokeniser file at",
        f"sentencepiece:{tmp_path}/none.model": "No tokeniser file at",
        specs["bare"]: "has no EOS",
        specs["odd_unsaid"]: "has no BOS among <s>, <bos>",
        specs["hf"] + "?eos=<nope>": "has no EOS among <nope>: name its piece, 'hf:FILE\\?eos=PIECE'",
        specs["hf"] + "?mask=x": "unknown options",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            open_tokenizer(spec)
