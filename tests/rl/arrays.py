"""Completions of three groups of five, made up: what the losses' tests have in common."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

Q, G, N, V = 3, 5, 7, 11
LENGTHS = np.array([[7, 1, 3, 5, 2], [4, 4, 7, 6, 1], [2, 7, 5, 3, 6]])
MASK = np.arange(N) < LENGTHS[..., None]


def arrays(seed: int = 0, apart: float = 0.3) -> SimpleNamespace:
    """Float64; log-probabilities of other policies differ by about `apart`. Garbage where nothing is scored."""
    rng = np.random.default_rng(seed)
    logp = -rng.gamma(2.0, 0.7, (Q, G, N))
    near = {n: logp + apart * rng.standard_normal(logp.shape) for n in ("old_logp", "ref_logp")}
    return SimpleNamespace(
        logp=logp, advantages=rng.standard_normal((Q, G)), entropy=rng.gamma(3.0, 0.4, logp.shape), mask=MASK, **near
    )  # fmt: skip


def spoiled(x: np.ndarray, by: float, mask: np.ndarray = MASK) -> np.ndarray:
    """x with `by` where nothing is scored."""
    return np.where(mask, x, by)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
