"""Loss by position against a loop over documents."""

import numpy as np
import pytest

from attnlab.evaluation import run
from attnlab.evaluation.per_position import LossCurve, marks
from tests.evaluation import small

TEXTS = small.documents([70, 5, 64, 90, 62, 101, 63, 66, 88])  # 62 + EOS is one target too few
LONG = [text for text in TEXTS if len(text) >= 63]


@pytest.fixture(scope="module")
def result():
    return run("per_position", small.context(TEXTS, per_position_smoothing=5))


@pytest.fixture(scope="module")
def losses():
    return np.stack(small.document_losses(LONG, 64))


def test_every_position_is_the_mean_of_a_loop(result, losses):
    rows = {key: np.array([row[key] for row in result.rows]) for key in result.rows[0]}
    np.testing.assert_array_equal(rows["position"], np.arange(64))
    np.testing.assert_array_equal(rows["documents"], len(LONG))
    np.testing.assert_allclose(rows["loss"], losses.mean(0), rtol=1e-5)
    np.testing.assert_allclose(rows["loss_se"], losses.std(0, ddof=1) / np.sqrt(len(LONG)), rtol=1e-4)
    up_to = [np.exp(losses[:, : l + 1].mean()) for l in range(64)]
    np.testing.assert_allclose(rows["perplexity"], up_to, rtol=1e-5)
    np.testing.assert_allclose(rows["smoothed"][10], losses.mean(0)[8:13].mean(), rtol=1e-5)


def test_scalars_compare_whole_documents(result, losses):
    scalars = result.scalars
    lengths = [name.partition("/")[2] for name in scalars if name.startswith("perplexity/")]
    assert [int(l) for l in lengths if not l.endswith("_se")] == [1, 2, 4, 8, 16, 32, 64]
    for l in (1, 8, 64):
        means = losses[:, :l].mean(1)
        np.testing.assert_allclose(scalars[f"perplexity/{l}"], np.exp(means.mean()), rtol=1e-5)
        error = np.exp(means.mean()) * means.std(ddof=1) / np.sqrt(len(LONG))
        np.testing.assert_allclose(scalars[f"perplexity/{l}_se"], error, rtol=1e-4)
    near, beyond = losses[:, 8:16].mean(1), losses[:, 16:].mean(1)
    np.testing.assert_allclose(scalars["trained_loss"], near.mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars["beyond_loss"], beyond.mean(), rtol=1e-5)
    gap = beyond - near
    np.testing.assert_allclose(scalars["extrapolation"], gap.mean(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(scalars["extrapolation_se"], gap.std(ddof=1) / np.sqrt(len(LONG)), rtol=1e-3)
    assert scalars["documents"] == len(LONG)


def test_the_number_of_documents_is_exact():
    context = small.context(TEXTS, batch_size=12, per_position_documents=4)  # three rows of 64 tokens
    assert run("per_position", context).scalars["documents"] == 4


def test_a_length_without_documents_is_refused():
    with pytest.raises(ValueError, match="no document of split 'validation' has 200 targets"):
        run("per_position", small.context(TEXTS, per_position_length=200))


def test_shorter_than_training_has_nothing_beyond():
    scalars = run("per_position", small.context(TEXTS, per_position_length=8)).scalars
    assert "perplexity/8" in scalars and not {"trained_loss", "beyond_loss"} & set(scalars)
    scalars = run("per_position", small.context(TEXTS, per_position_length=16)).scalars
    assert "trained_loss" in scalars and "beyond_loss" not in scalars


def test_marks():
    assert marks(24, 5) == [1, 2, 4, 5, 8, 16, 24]
    assert marks(3, 100) == [1, 2, 3]
    assert marks(1, 1) == [1]


def test_one_document_has_no_error():
    curve = LossCurve(3, marks(3, 3))
    curve.add(np.array([[1.0, 2.0, 6.0]], np.float32))
    assert curve.loss()[0].tolist() == [1, 2, 6] and np.isnan(curve.loss()[1]).all()
    assert curve.between(1, 3).tolist() == [4]


def test_figure(result):
    axes = result.figure().axes[0]
    assert any(line.get_label() == "training length" and line.get_xdata()[0] == 16 for line in axes.lines)
