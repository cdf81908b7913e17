"""What is claimed of EGSW against GRPO, each put to the numbers: "shows", "does not show", or "within the noise".

A difference is taken seed by seed, as runs of a seed see the same problems. It shows if its mean is beyond the bound,
no seed has the other sign, and a one-sided t-test over the seeds puts it beyond 0. Gates do without the last.

Letters: S seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from attnlab.reproduce.histories import LAST, History, differences, numbers

Value = Callable[[History], float]
BEGINNING = 5  # steps that count as the start
# 95 % quantile of Student's t for S - 1 degrees of freedom, S = 2, 3, ..; beyond the list the normal one is close
QUANTILES = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83)
EARLY = 15 / 58  # of a run: where the published curves part


@dataclasses.dataclass(frozen=True)
class Claim:
    """`sign` * (value of a - value of b) is claimed to exceed `bound`; "within": |difference| stays below it.

    b "start": the policy that all runs began from. `gate`: one that a correct implementation has to pass.
    """

    what: str
    a: str
    b: str
    value: Value
    sign: int = 1  # 0: within
    bound: float = 0.0
    gate: bool = False


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim with its differences [S] and what became of it."""

    claim: Claim
    differences: np.ndarray
    verdict: str

    @property
    def sentence(self) -> str:
        claim, mean = self.claim, self.differences.mean()
        each = ", ".join(f"{value:+.3f}" for value in self.differences)
        asked = {0: "within +-", 1: "at least +", -1: "at most -"}[claim.sign] + f"{claim.bound:.2f}"
        asked = asked if claim.bound or claim.gate else "above 0"
        return f"{claim.what}: {claim.a} - {claim.b} = {mean:+.3f} ({each}; asked: {asked}): {self.verdict}."


def final(name: str) -> Value:
    return lambda history: numbers(history)[name]


def beginning(history: History) -> float:
    return history.curves["reward"].mean(1, BEGINNING)


def from_early_on(history: History) -> float:
    return history.curves["reward"].mean(round(EARLY * history.steps) + 1, history.steps)


def gained(name: str) -> Value:
    """By a run, since the policy it began from."""
    return lambda history: numbers(history)[name] - history.curves[name].values[0]


CLAIMS = (
    Claim("Same start, reward of the first 5 steps", "egsw", "grpo", beginning, 0, 0.03),
    Claim("Higher training reward after the first quarter", "egsw", "grpo", from_early_on),
    Claim(f"Higher training reward in the last {LAST} steps", "egsw", "grpo", final("reward")),
    Claim(
        f"Training reward comparable in the last {LAST} steps", "egsw", "grpo", final("reward"), 0, 0.06, True
    ),
    Claim("GRPO learns, held-out mean@8", "grpo", "start", gained("mean_at_8"), 1, 0.05, True),
    Claim("EGSW learns, held-out mean@8", "egsw", "start", gained("mean_at_8"), 1, 0.05, True),
    Claim("Entropy is kept", "egsw", "grpo", final("entropy"), 1, 0.04, True),
    Claim("Fewer groups without a gradient", "egsw", "grpo", final("zero_std"), -1, 0.08, True),
    Claim("pass@8 is not lower", "egsw", "grpo", final("pass_at_8"), 1, 0.0, True),
    Claim("pass@8 of the start is kept by EGSW", "egsw", "start", gained("pass_at_8"), 0, 0.05),
    Claim("pass@8 of the start is kept by GRPO", "grpo", "start", gained("pass_at_8"), 0, 0.05),
    Claim("The entropy term adds entropy", "egsw", "egsw_alpha0", final("entropy")),
    Claim("The entropy term adds mean@8", "egsw", "egsw_alpha0", final("mean_at_8")),
    Claim("The entropy term adds pass@8", "egsw", "egsw_alpha0", final("pass_at_8")),
    Claim("More pass@8 than an entropy bonus", "egsw", "entropy_bonus", final("pass_at_8")),
)


def judge(claim: Claim, found: np.ndarray) -> str:
    """The verdict on differences [S]."""
    if claim.sign == 0:
        return "shows" if abs(found.mean()) <= claim.bound else "does not show"
    towards = claim.sign * found
    if claim.gate:
        return "shows" if towards.mean() >= claim.bound and (towards >= 0).all() else "does not show"
    if towards.mean() <= claim.bound:
        return "does not show"
    if len(found) == 1:
        return "undecided, one seed"
    error = towards.std(ddof=1) / math.sqrt(len(found))
    quantile = QUANTILES[min(len(found) - 2, len(QUANTILES) - 1)]
    return "shows" if (towards > 0).all() and towards.mean() > quantile * error else "within the noise"


def findings(runs: Mapping[str, Sequence[History]]) -> list[Finding]:
    """Of all claims about methods that were run."""
    found = []
    for claim in CLAIMS:
        if claim.a not in runs or (claim.b != "start" and claim.b not in runs):
            continue
        if claim.b == "start":
            values = np.array([claim.value(history) for history in runs[claim.a]])
        else:
            values = differences(runs[claim.a], runs[claim.b], claim.value)
        found.append(Finding(claim, values, judge(claim, values)))
    return found
