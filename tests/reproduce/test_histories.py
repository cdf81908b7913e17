"""Runs' metrics become curves and numbers without loss."""

import dataclasses

import numpy as np
import pytest

from attnlab.reproduce.figures import band
from attnlab.reproduce.histories import Curve, by_method, differences, numbers, read_history
from tests.reproduce.records import START, STEPS, final, metrics, write_run


@pytest.fixture
def history(tmp_path):
    write_run(tmp_path / "run", metrics(0.6, 0.25, 0.4, ess=0.8), final(0.42, 0.75))
    return read_history("egsw", 2, tmp_path / "run", START)


class TestHistory:
    def test_training_curves_are_what_was_recorded(self, history):
        reward = history.curves["reward"]
        np.testing.assert_array_equal(reward.steps, np.arange(1, STEPS + 1))
        np.testing.assert_array_equal(reward.tokens, 100.0 * reward.steps)
        np.testing.assert_allclose(reward.values, 0.3 + 0.01 * reward.steps)
        assert set(history.curves["ess"].values) == {0.8} and history.steps == STEPS

    def test_held_out_curves_begin_with_the_policy_the_run_began_from(self, history):
        curve = history.curves["mean_at_8"]
        np.testing.assert_array_equal(curve.steps, [0, 10, 20, 30])
        np.testing.assert_array_equal(curve.tokens, [0, 1000, 2000, 3000])
        np.testing.assert_allclose(curve.values, [0.3, 0.3 + 1 / 30, 0.3 + 2 / 30, 0.4])

    def test_runs_without_weights_weigh_all_alike(self, tmp_path):
        write_run(tmp_path / "run", metrics(0.6, 0.25, 0.4), final(0.42, 0.75))
        ess = read_history("grpo", 1, tmp_path / "run", START).curves["ess"]
        assert len(ess.steps) == STEPS and (ess.values == 1).all()

    def test_numbers_are_means_of_the_last_steps_and_the_final_evaluation(self, history):
        found = numbers(history)
        assert found["reward"] == pytest.approx(0.3 + 0.01 * np.arange(11, 31).mean())
        assert (found["mean_at_8"], found["pass_at_8"], found["accuracy"]) == (0.42, 0.75, 0.45)
        assert [found[name] for name in ("entropy", "zero_std", "ess")] == pytest.approx([0.25, 0.4, 0.8])

    def test_a_line_cut_off_by_a_kill_is_left_out(self, tmp_path):
        folder = write_run(tmp_path / "run", metrics(0.6, 0.25, 0.4), final(0.42, 0.75))
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 31, "train/rew')
        assert read_history("grpo", 1, folder, START).steps == STEPS


def test_differences_are_taken_seed_by_seed(history):
    def of_seed(seed, pass_at_8):
        return dataclasses.replace(history, seed=seed, final=final(0.4, pass_at_8))

    a, b = [of_seed(3, 0.9), of_seed(1, 0.7)], [of_seed(1, 0.6), of_seed(2, 0.1), of_seed(3, 0.95)]
    found = differences(a, b, lambda run: run.final["pass_at_8"])
    np.testing.assert_allclose(found, [0.1, -0.05])  # seeds 1 and 3


def test_methods_keep_their_order_and_seeds_ascend(history):
    given = [("b", 2), ("a", 1), ("b", 1)]
    found = by_method([dataclasses.replace(history, method=method, seed=seed) for method, seed in given])
    assert {method: [run.seed for run in runs] for method, runs in found.items()} == {"b": [1, 2], "a": [1]}
    assert list(found) == ["b", "a"]


class TestCurves:
    def test_means_hold_both_ends(self):
        curve = Curve(np.arange(1.0, 6), np.zeros(5), np.array([1.0, 2, 4, 8, 16]))
        assert (curve.mean(2, 4), curve.mean(5, 9)) == (14 / 3, 16.0) and np.isnan(curve.mean(6, 9))

    def test_bands_are_lowest_mean_and_highest_at_the_common_steps(self):
        one = Curve(np.array([1.0, 2, 3]), np.array([10.0, 20, 30]), np.array([1.0, 5, 9]))
        two = Curve(np.array([1.0, 3, 4]), np.array([14.0, 34, 44]), np.array([3.0, 1, 0]))
        found = band([one, two], False, "tokens")
        np.testing.assert_array_equal(found, [[12, 32], [1, 1], [2, 5], [3, 9]])
        np.testing.assert_array_equal(band([one], False, "steps")[0], [1, 2, 3])

    def test_smoothed_bands_are_of_smoothed_seeds(self):
        steps, values = np.arange(1.0, 4), np.array([0.0, 3, 0])
        x, lowest, mean, highest = band(
            [Curve(steps, steps, values), Curve(steps, steps, -values)], True, "steps"
        )
        np.testing.assert_allclose([lowest, mean, highest], [[0, -1, 0], [0, 0, 0], [0, 1, 0]])
