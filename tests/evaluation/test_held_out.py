"""Held-out numbers against a loop over single documents; the same for every batch size, mesh and grouping."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from attnlab.evaluation import run, scores
from attnlab.evaluation.held_out import document_sums
from attnlab.objectives.language_modelling import token_losses
from attnlab.training.sharding import MeshConfig, make_mesh
from tests.evaluation import small

TEXTS = small.documents([5, 15, 1, 9, 14, 3, 11, 7, 13, 2, 15])
LONG = small.documents([37, 4, 61, 18, 2, 29, 47])


def naive(texts):
    losses = small.document_losses(texts, 16)
    nll, size = np.array([loss.sum() for loss in losses]), np.array([len(text) for text in texts])
    return nll, size, np.array([len(loss) for loss in losses])


@functools.cache
def model():
    return jax.jit(small.objective().module.apply)


def piece_loss(tokens) -> float:
    """The summed loss of tokens [n + 1] on their own."""
    padded = np.pad(tokens, (0, 17 - len(tokens)))[None]
    logits = model()({"params": small.params()}, padded[:, :-1])
    return float(token_losses(logits, padded[:, 1:])[0][0, : len(tokens) - 1].sum())


@pytest.mark.smoke
def test_numbers_are_those_of_a_loop_over_documents():
    nll, size, tokens = naive(TEXTS)
    result = run("held_out", small.context(TEXTS))
    bits = nll.sum() / math.log(2) / size.sum()
    residual = nll / math.log(2) - bits * size
    n = len(TEXTS)
    expected = {
        "loss": nll.sum() / tokens.sum(),
        "perplexity": math.exp(nll.sum() / tokens.sum()),
        "bits_per_byte": bits,
        "bits_per_byte_se": math.sqrt(n / (n - 1) * (residual**2).sum()) / size.sum(),
        "targets": tokens.sum(),
        "bytes": size.sum(),
        "documents": n,
        "batches": 3,  # full rows, whichever documents are long
    }
    for name, value in expected.items():
        np.testing.assert_allclose(result.scalars[name], value, rtol=1e-5, err_msg=name)
    assert 0 <= result.scalars["accuracy"] <= 1
    assert sorted(row["bytes"] for row in result.rows) == sorted(size)
    np.testing.assert_allclose(sum(row["loss"] * row["targets"] for row in result.rows), nll.sum(), rtol=1e-5)
    assert (result.about["step"], result.about["split"]) == (7, "validation")


def test_accuracy_counts_the_likeliest_token():
    losses = small.document_losses(
        TEXTS, 16
    )  # a hit has at least the probability of a miss, so test by the argmax
    result = run("held_out", small.context(TEXTS))
    hits = 0
    for text, loss in zip(TEXTS, losses, strict=True):
        tokens = np.pad(np.array([256, *text, 257], np.int32), (0, 17))[:17]
        best = np.asarray(model()({"params": small.params()}, tokens[None, :-1])).argmax(-1)[0]
        hits += (best == tokens[1:])[: len(loss)].sum()
    assert result.scalars["accuracy"] * result.scalars["targets"] == pytest.approx(hits)


def test_the_batch_size_does_not_matter():
    three, eight = (run("held_out", small.context(LONG + TEXTS, batch_size=b)) for b in (3, 8))
    for name in set(three.scalars) - {"batches"}:
        np.testing.assert_allclose(eight.scalars[name], three.scalars[name], rtol=1e-6, err_msg=name)
    assert sum(row["targets"] for row in eight.rows) == sum(len(text) + 1 for text in LONG + TEXTS)


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}], ids=str)
def test_the_mesh_does_not_matter(shape):
    one = run("held_out", small.context(LONG, batch_size=3))
    context = small.context(LONG, batch_size=3, mesh=make_mesh(MeshConfig(**shape)))
    many = run("held_out", context)
    for name, value in one.scalars.items():
        np.testing.assert_allclose(many.scalars[name], value, rtol=1e-5, err_msg=name)


def test_long_documents_are_cut_at_their_own_multiples():
    result = run("held_out", small.context(LONG))
    assert sorted(row["bytes"] for row in result.rows) == sorted(map(len, LONG))
    assert sorted(row["targets"] for row in result.rows) == sorted(len(text) + 1 for text in LONG)
    tokens = [np.array([256, *text, 257]) for text in LONG]
    pieces = [t[start : start + 17] for t in tokens for start in range(0, len(t) - 1, 16)]
    expected = sum(piece_loss(piece) for piece in pieces) / sum(len(piece) - 1 for piece in pieces)
    np.testing.assert_allclose(result.scalars["loss"], expected, rtol=1e-5)


def test_document_sums_go_on_from_batch_to_batch():
    ones = {name: np.ones((2, 2), np.float32) for name in ("hits", "weights", "bytes")}
    first = {"document": np.array([[0, 0], [1, 1]]), "nll": np.array([[1, 2], [4, 8]]), **ones}
    second = {"document": np.array([[0, 4], [1, 0]]), "nll": np.array([[16, 32], [64, 0]]), **ones}
    second["weights"] = second["hits"] = second["bytes"] = np.array([[1, 1], [1, 0]], np.float32)
    sums, batches = document_sums([first, second])
    assert sums["nll"].tolist() == [19, 76, 32] and sums["weights"].tolist() == [3, 3, 1] and batches == 2


def test_a_limited_number_of_batches_is_a_part_of_the_split():
    two = run("held_out", small.context(LONG, batches=2))
    assert two.scalars["batches"] == 2
    assert two.scalars["targets"] <= 2 * 3 * 16 < run("held_out", small.context(LONG)).scalars["targets"]


def test_lengths_and_batches_of_their_own():
    context = small.context(LONG, batch_size=3, sequence_length=16)
    whole = run("held_out", small.with_eval(context, sequence_length=64, batch_size=7))
    losses = small.document_losses(LONG, 64)
    expected = sum(loss.sum() for loss in losses) / sum(map(len, losses))
    np.testing.assert_allclose(whole.scalars["loss"], expected, rtol=1e-5)
    assert abs(run("held_out", context).scalars["loss"] - expected) > 1e-4, "shorter windows see less"


def test_a_second_evaluation_compiles_nothing():
    run("held_out", small.context(TEXTS))
    compiled = scores._score._cache_size()
    run("held_out", small.context(TEXTS))
    assert scores._score._cache_size() == compiled


def test_a_length_the_mesh_does_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(data=1, sequence=8))
    context = small.context(TEXTS, sequence_length=12, mesh=mesh)
    with pytest.raises(ValueError, match="evaluation length 12 is not a multiple of mesh.sequence=8"):
        run("held_out", context)


def test_the_z_loss_of_training_is_no_part_of_the_loss():
    context = small.context(TEXTS)
    plain = dataclasses.replace(context.objective.options, z_loss=0.0)
    other = dataclasses.replace(context, objective=dataclasses.replace(context.objective, options=plain))
    assert run("held_out", other).scalars == run("held_out", context).scalars
