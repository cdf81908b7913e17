"""Solved problems as documents, and targets that count only after a given text, whatever the tokeniser."""

import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers

from attnlab.data import DataConfig, make_loader, open_source, open_tokenizer
from attnlab.data.packing import EncodedDocuments
from attnlab.data.problems import open_problems, split_of

EQUALS, EOS = ord("="), 257


@pytest.fixture(scope="module")
def multibyte(tmp_path_factory):
    """Specs of tokenisers whose ids hold several bytes, or a part of a character."""
    folder = tmp_path_factory.mktemp("multibyte")
    lines = [f"{i}+{i}={2 * i} größer → 日本\n" for i in range(40)]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    model.train_from_iterator(lines, trainer)
    model.save(f"{folder}/bpe.json")
    options = {"vocab_size": 340, "byte_fallback": True, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        model_prefix=f"{folder}/sp", sentence_iterator=iter(lines), remove_extra_whitespaces=False, **options
    )
    return {"hf": f"hf:{folder}/bpe.json", "sentencepiece": f"sentencepiece:{folder}/sp.model"}


def texts(source, count=40):
    return [source[i] for i in range(count)]


@pytest.mark.smoke
def test_documents_are_questions_with_their_solutions():
    train = open_source("problems:sort(noise=0.5, level=5)", "train")
    test = open_source("problems:sort(level=5, size=7)", "test")
    assert (len(train), len(test)) == (1_000_000, 7)
    found = texts(train)
    assert found == texts(pickle.loads(pickle.dumps(train))) and len(set(found)) > 35
    shuffled = 0
    for text in found:
        question, _, solution = text.partition("=")
        assert split_of(f"sort {question}=") == "train" and sorted(question) == sorted(solution)
        shuffled += solution != "".join(sorted(solution))
    assert 8 < shuffled < 32
    assert all(split_of("sort " + text[:6]) == "test" for text in texts(test, 7))
    asked = open_problems("problems:sort(level=5)", "train")
    assert not set(found) & {asked.problem(n).question + asked.problem(n).solution for n in range(200)}
    with pytest.raises(
        ValueError, match="'problems:sort' have no split 'validation': they have train and test"
    ):
        open_source("problems:sort", "validation")


def test_the_barrier_is_met_once():
    met = []
    for leader in (True, False):
        open_source("problems:sort", "train", leader=leader, barrier=lambda: met.append(1))
    assert len(met) == 2


@pytest.mark.parametrize("packing", ["concatenate", "truncate"])
def test_only_solutions_are_learnt(load, take, assert_same, packing):
    source = open_source("problems:countdown(size=30)", "train")
    plain = take(load(source, packing=packing), 12)
    batches = take(load(source, packing=packing, learn_after="="), 12)
    weights, want = batches.pop("weights"), plain.pop("weights")
    assert_same(batches, plain)  # nothing but the weights changes
    assert set(want.flat) <= {0.0, 1.0} and weights.dtype == np.float32
    for row in range(7):
        targets, segments = (batches[name][:, row].reshape(-1) for name in ("targets", "segments"))
        learn = False  # rows begin with a question, and every document has one "="
        for place, target in enumerate(targets):
            assert weights[:, row].reshape(-1)[place] == float(learn and segments[place] > 0)
            learn = target == EQUALS or (learn and target != EOS and segments[place] > 0)
    assert 0.3 < weights.sum() / want.sum() < 0.7


@pytest.mark.thorough
def test_workers_and_cursors_agree(load, take, assert_same):
    source = open_source("problems:countdown", "train")
    plain = take(load(source, learn_after="="), 8)
    loader = load(source, learn_after="=", workers=2, prefetch=1, cursor=plain["cursor"][1])
    assert_same(take(loader, 6), {name: array[2:] for name, array in plain.items()})


def test_the_loader_opens_problems_by_their_spec(take):
    config = DataConfig(
        source="problems:reverse", eval_split="test", sequence_length=17, batch_size=3, prefetch=0
    )
    assert config.validate() is config
    loader = make_loader(
        config,
        open_tokenizer("bytes"),
        rows=range(3),
        split="test",
        repeat=False,
        shuffle=True,
        packing="truncate",
    )
    tokens = take(loader, 4)["tokens"].reshape(12, 17)
    loader.close()
    for row in tokens:
        question, _, answer = bytes(row[1:14].astype(np.uint8)).partition(b"=")
        assert answer == question[::-1] and split_of(f"reverse {question.decode()}=") == "test"


def test_encoded_documents_travel_to_workers_with_their_weights():
    encoded = EncodedDocuments(open_source("problems:countdown", "train"), open_tokenizer("bytes"), "=")
    copy = pickle.loads(pickle.dumps(encoded))
    assert not encoded[3].weights.all()
    for name in ("tokens", "num_bytes", "weights"):
        np.testing.assert_array_equal(getattr(copy[3], name), getattr(encoded[3], name))


def weights(text, after, tokenizer="bytes"):
    return EncodedDocuments([text], open_tokenizer(tokenizer), after)[0].weights.tolist()


def test_weights_by_hand():
    assert weights("ab=c", "=") == [0, 0, 0, 1, 1]
    assert weights("a=b=c", "=") == [0, 0, 1, 1, 1, 1]  # the first one only
    assert weights("=", "=") == [0, 1] and weights("", "=") == [1]
    assert weights("ab", "=") == [1] * 3 and weights("ab=", "") == [1] * 4
    assert weights("x -> y", "-> ") == [0] * 5 + [1, 1]
    assert weights("é→b", "→") == [0] * 5 + [1, 1] and weights(b"\xff=\xff", "=") == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["hf", "sentencepiece"])
@pytest.mark.parametrize("after", ["=", "→", " → ", "ö", "日", "zz"])
def test_weights_follow_the_bytes_of_any_tokeniser(multibyte, name, after):
    tokenizer = open_tokenizer(multibyte[name])
    for text in (
        "7+7=14 größer → 日本\n",
        "größer = →→ 日日",
        "=",
        "日本日本 = ö",
        "é=é→é",
        b"\xff\xfe=1 \xff \xe2\x86\x92",
    ):
        document = EncodedDocuments([text], tokenizer, after)[0]
        read = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
        stops = np.cumsum(document.num_bytes)
        assert stops[-1] == len(read.encode())
        border = len(read[: read.find(after) + len(after)].encode()) if after in read else 0
        starts = stops - document.num_bytes
        for i, weight in enumerate(document.weights[:-1]):
            inside = stops[i] < border or (stops[i] == border and starts[i] < border)
            assert weight == float(not inside), (text, i)
        assert document.weights[-1] == 1 and len(document.weights) == len(document)
        np.testing.assert_array_equal(document.tail(1).weights, document.weights[1:])
    plain = EncodedDocuments([text], tokenizer)[0]
    np.testing.assert_array_equal(plain.tokens, document.tokens)
    assert plain.weights.all() and plain.weights.dtype == np.float32


def test_a_token_that_reaches_beyond_the_text_counts(multibyte):
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "1": 2, "=2": 3, "日": 4}, unk_token="<s>")
    )
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex("1|=2|日"), behavior="isolated")
    model.pre_tokenizer = split
    path = multibyte["hf"].removeprefix("hf:").replace("bpe", "words")
    model.save(path)
    assert weights("1=21", "=", f"hf:{path}") == [0, 1, 1, 1]
    assert weights("1=21", "=2", f"hf:{path}") == [0, 0, 1, 1]
    assert weights("日=2日", "日", f"hf:{path}") == [0, 1, 1, 1]
