"""Verdicts follow the numbers."""

import dataclasses

import numpy as np
import pytest

from attnlab.reproduce.claims import CLAIMS, Claim, Finding, final, findings, judge
from attnlab.reproduce.histories import by_method, read_history
from tests.reproduce import records


def claim(sign=1, bound=0.0):
    return Claim("more", "a", "b", final("reward"), sign, bound)


def gate(sign=1, bound=0.0):
    return dataclasses.replace(claim(sign, bound), gate=True)


@pytest.mark.parametrize(
    ("given", "found", "verdict"),
    [
        (claim(), [0.1, 0.11], "shows"),
        (claim(), [0.1, 0.11, 0.0], "within the noise"),  # one seed shows nothing
        (claim(), [0.1, 0.13], "shows"),  # 0.115 +- 0.015, t 7.7
        (claim(), [0.1, 0.15], "within the noise"),  # 0.125 +- 0.025, t 5.0: two seeds ask for 6.31
        (claim(), [0.1, 0.15, 0.15], "shows"),  # t 8.0: three ask for 2.92
        (claim(), [0.037, 0.002, 0.021], "within the noise"),  # t 2.0
        (claim(), [0.1, 0.15] * 20, "shows"),
        (claim(), [0.1, -0.05], "within the noise"),
        (claim(), [-0.1, 0.05], "does not show"),
        (claim(), [0.0, 0.0], "does not show"),
        (claim(), [0.1], "undecided, one seed"),
        (claim(), [-0.1], "does not show"),
        (claim(-1), [-0.1, -0.11], "shows"),
        (claim(0, 0.06), [0.2, -0.2], "shows"),
        (claim(0, 0.06), [-0.07, -0.07], "does not show"),
        (gate(bound=0.04), [0.01, 0.2], "shows"),
        (gate(bound=0.04), [0.01, 0.06], "does not show"),
        (gate(bound=0.04), [-0.01, 0.2], "does not show"),
        (gate(), [0.0, 0.0], "shows"),  # "not lower"
        (gate(-1, 0.08), [-0.1, -0.2], "shows"),
        (gate(-1, 0.08), [0.1, 0.2], "does not show"),
    ],
)
def test_verdicts(given, found, verdict):
    assert judge(given, np.array(found)) == verdict


def test_a_sentence_has_the_numbers_of_every_seed():
    found = Finding(claim(-1, 0.08), np.array([-0.1, -0.21]), "shows")
    assert found.sentence == "more: a - b = -0.155 (-0.100, -0.210; asked: at most -0.08): shows."
    assert "asked: above 0" in Finding(claim(), np.array([0.1]), "shows").sentence
    assert "asked: at least +0.00" in Finding(gate(), np.array([0.1]), "shows").sentence


@pytest.fixture
def runs(tmp_path):
    """GRPO gains mean@8 and loses pass@8 and entropy; EGSW learns as much and keeps them."""
    made = {
        "grpo": (records.metrics(0.5, 0.2, 0.5), records.final(0.42, 0.7)),
        "egsw": (records.metrics(0.49, 0.3, 0.3, ess=0.8), records.final(0.41, 0.83)),
    }
    found = []
    for method, (metrics, final_numbers) in made.items():
        for seed in (1, 2):
            folder = records.write_run(tmp_path / f"{method}-{seed}", metrics, final_numbers)
            found.append(read_history(method, seed, folder, records.START))
    return by_method(found)


def test_what_is_claimed_of_these_runs(runs):
    found = {finding.claim.what: finding for finding in findings(runs)}
    verdicts = {what: finding.verdict for what, finding in found.items()}
    assert verdicts == {
        "Same start, reward of the first 5 steps": "shows",
        "Higher training reward after the first quarter": "does not show",
        "Higher training reward in the last 20 steps": "does not show",
        "Training reward comparable in the last 20 steps": "shows",
        "GRPO learns, held-out mean@8": "shows",
        "EGSW learns, held-out mean@8": "shows",
        "Entropy is kept": "shows",
        "Fewer groups without a gradient": "shows",
        "pass@8 is not lower": "shows",
        "pass@8 of the start is kept by EGSW": "shows",
        "pass@8 of the start is kept by GRPO": "does not show",
    }
    np.testing.assert_allclose(found["Fewer groups without a gradient"].differences, [-0.2, -0.2])
    np.testing.assert_allclose(found["pass@8 of the start is kept by GRPO"].differences, [-0.15, -0.15])
    early = found["Higher training reward after the first quarter"].differences
    np.testing.assert_allclose(early, -0.01 * np.arange(9, 31).mean() / 30)  # from step 9 of 30: 15 / 58


def test_exchanged_methods_turn_the_verdicts(runs):
    found = {
        finding.claim.what: finding.verdict
        for finding in findings({"grpo": runs["egsw"], "egsw": runs["grpo"]})
    }
    assert found["Entropy is kept"] == found["pass@8 is not lower"] == "does not show"
    assert found["Higher training reward in the last 20 steps"] == "shows"


def test_methods_that_were_not_run_have_no_claims(runs):
    assert [finding.claim.what for finding in findings({"grpo": runs["grpo"]})] == [
        claim.what for claim in CLAIMS if (claim.a, claim.b) == ("grpo", "start")
    ]
