"""The problems evaluator: its estimates by brute force, its numbers for policies whose answers are known."""

import itertools
import math

import jax
import numpy as np
import pytest

from attnlab.evaluation import run
from attnlab.evaluation.problems import Answers, majority_at, pass_at, summarize
from attnlab.experiment import open_task
from attnlab.models.language_model import LanguageModel
from attnlab.training.sharding import MeshConfig, make_mesh
from tests.tasks.runs import experiment


@pytest.mark.parametrize("n, k", [(5, 1), (5, 3), (5, 5), (7, 2)])
def test_pass_at_k_is_the_mean_over_all_choices(n, k):
    for right in range(n + 1):
        marks = [True] * right + [False] * (n - right)
        chosen = [any(choice) for choice in itertools.combinations(marks, k)]
        assert pass_at(n, np.array(right), k) == pytest.approx(np.mean(chosen))


def test_majority_takes_the_commonest_and_of_equals_the_earliest():
    texts = [["1", "2", "2 ", "1"], ["a", "b", "c", "d"], ["x", "y", "y", "z"]]
    right = np.array([[1, 0, 0, 1], [0, 1, 1, 1], [0, 1, 1, 0]], bool)
    answers = Answers(right, texts, np.ones((3, 4)), np.zeros((3, 4)))
    assert majority_at(answers, 4).tolist() == [1, 0, 1]
    assert majority_at(answers, 2).tolist() == [1, 0, 0]
    assert majority_at(answers, 3).tolist() == [0, 0, 1]


def test_scalars_and_their_errors():
    greedy = Answers(np.array([[1], [0], [1], [1]], bool), [["1"]] * 4, np.full((4, 1), 2), np.zeros((4, 1)))
    right = np.array([[1, 1], [0, 0], [1, 0], [0, 1]], bool)
    sampled = Answers(
        right, [["1", "1"], ["2", "3"], ["1", "4"], ["5", "1"]], np.full((4, 2), 3), np.full((4, 2), 0.5)
    )
    found = summarize(greedy, sampled, (1, 2))
    assert (found["accuracy"], found["error"], found["mean_at_2"]) == (0.75, 0.25, 0.5)
    assert (found["pass_at_1"], found["pass_at_2"], found["majority_at_2"]) == (0.5, 0.75, 0.5)
    assert (found["length"], found["entropy"], found["problems"]) == (3, 0.5, 4)
    assert found["accuracy_se"] == pytest.approx(math.sqrt(0.75 * 0.25 * 4 / 3) / 2)


def test_a_policy_that_is_measured():
    """Greedy answers are the likeliest tokens; a mesh and a batch that does not divide the problems change nothing."""
    given = experiment({"rewards": "tests.tasks.runs:printable"})
    task = open_task(given)
    params = task.objective.init(jax.random.key(0))
    found = {}
    for devices in (1, 8):
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        result = run("problems", task.context(params, mesh))
        found[devices] = (result.scalars, result.rows)
        assert len(result.rows) == 8 and result.figure() is not None
        assert set(result.scalars) >= {
            "accuracy",
            "mean_at_4",
            "pass_at_4",
            "majority_at_4",
            "entropy",
            "length",
        }
    assert found[1][1] == found[8][1]
    question = task.explorer.prompter.encode(task.explorer.prompter.source.at(0))
    assert len(question) == 5  # BOS, three digits, the sign
    row = found[1][1][0]
    tokens = np.concatenate([[256], np.frombuffer(row["question"].encode(), np.uint8)])[None].astype(np.int32)
    logits = LanguageModel(task.experiment.model).apply({"params": params}, tokens)[0, -1]
    allowed = np.where(
        np.isin(np.arange(len(logits)), [256, 258]) | (np.arange(len(logits)) >= 264), -np.inf, logits
    )
    first = task.tokenizer.decode([int(np.argmax(allowed))])
    assert row["greedy"].startswith(first)
