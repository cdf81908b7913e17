"""EGSW weights: the equation in loops, its limits and invariances, rows that take no part, and where gradients go."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.rl.config import WEIGHT_NAMES, SequenceWeightConfig
from attnlab.rl.sequence_weights import SEQUENCE_WEIGHTS, sequence_weights, statistics
from tests.rl.arrays import LENGTHS, G, N, Q, V, arrays, float64, spoiled  # noqa: F401

pytestmark = pytest.mark.usefixtures("float64")
EGSW = SequenceWeightConfig(name="egsw", alpha=0.7, temperature=1.3)
STEP = dataclasses.replace(EGSW, mode="step")
ALIKE = dict(rtol=1e-12, atol=1e-13)
X = arrays()


jitted = jax.jit(sequence_weights, static_argnums=(0, 4))
jitted_statistics = jax.jit(statistics, static_argnums=(0, 5))


def compute(config, A=X.advantages, H=X.entropy, mask=X.mask, **rest):
    return np.asarray(jitted(config, A, H, mask, V, **rest))


def say(config, w, A, H, mask):
    """`statistics` by the names after the "egsw/" that all of them begin with."""
    said = jitted_statistics(config, w, A, H, mask, V)
    return {name.removeprefix("egsw/"): float(x) for name, x in said.items()}


def loops(config, A, H, mask):
    """The equation a row at a time; A a number a token or a row."""
    c, w = config, np.zeros(mask.shape)
    A = np.broadcast_to(A.reshape(*A.shape[:2], -1), mask.shape)
    unit = math.log(V) if c.entropy_norm == "log_vocab" else 1.0
    reduce = {"mean": np.mean, "sum": np.sum, "max": np.max}[c.entropy_agg]
    for q in range(len(mask)):
        for t in range(mask.shape[-1]):
            scores = {}
            for i, row in enumerate(mask[q]):
                if not row.any() or (c.mode == "step" and c.step_members == "alive" and not row[t]):
                    continue
                if c.mode == "step":
                    a, h = (
                        (A[q, i, t] if row[t] or A.strides[-1] == 0 else 0.0),
                        (H[q, i, t] if row[t] else 0.0),
                    )
                else:
                    a, h = A[q, i][row].mean(), reduce(H[q, i][row])
                scores[i] = math.exp((a + c.alpha * h / unit) / c.temperature)
            for i in scores:
                n = len(scores) if c.scale == "group" else 1
                w[q, i, t] = n * scores[i] / sum(scores.values())
    return w[..., 0] if c.mode == "trajectory" else np.where(mask, w, 0)


HOLES = X.mask & (np.arange(G) != 1)[None, :, None]  # row 1 of every group has nothing scored


@pytest.mark.parametrize("by_token", [False, True], ids=["rows", "tokens"])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"entropy_agg": "sum", "scale": "unit"}, {"entropy_agg": "max"}, {"entropy_norm": "log_vocab"},
        {"mode": "step"}, {"mode": "step", "scale": "unit", "alpha": -0.4},
        {"mode": "step", "step_members": "all", "entropy_norm": "log_vocab"},
    ],
    ids=str,
)  # fmt: skip
def test_weights_equal_the_equation(changes, by_token):
    config = dataclasses.replace(EGSW, **changes)
    A = np.random.default_rng(1).standard_normal((Q, G, N)) if by_token else X.advantages
    given = spoiled(A, np.nan, HOLES) if by_token else A
    got = compute(config, given, spoiled(X.entropy, np.nan, HOLES), HOLES)
    np.testing.assert_allclose(got, loops(config, A, X.entropy, HOLES), **ALIKE)


@pytest.mark.parametrize("config", [EGSW, STEP], ids=["trajectory", "step"])
def test_weights_average_one_or_sum_to_one(config):
    alive = HOLES if config is STEP else HOLES.any(-1)
    w = compute(config, mask=HOLES)
    np.testing.assert_allclose(w.sum(1), alive.sum(1), **ALIKE)
    assert not w[~alive].any() and (w[alive] > 0).all()
    unit = compute(dataclasses.replace(config, scale="unit"), mask=HOLES)
    np.testing.assert_allclose(unit.sum(1), alive.any(1), **ALIKE)


@pytest.mark.parametrize("members", ["alive", "all"])
@pytest.mark.parametrize("mode", ["trajectory", "step"])
def test_infinite_temperature_is_plain_grpo(mode, members):
    config = dataclasses.replace(EGSW, mode=mode, temperature=math.inf, step_members=members)
    alive = HOLES if mode == "step" else HOLES.any(-1)
    np.testing.assert_array_equal(compute(config, mask=HOLES), alive)
    np.testing.assert_allclose(
        compute(dataclasses.replace(config, temperature=1e9), mask=HOLES), alive, atol=1e-8
    )
    plain = compute(SequenceWeightConfig(), mask=HOLES)
    np.testing.assert_array_equal(plain, HOLES.any(-1))


def test_no_temperature_leaves_the_best_row():
    w = compute(dataclasses.replace(EGSW, temperature=1e-9))
    H = np.where(X.mask, X.entropy, 0).sum(-1) / LENGTHS
    best = (X.advantages + EGSW.alpha * H).argmax(1)
    np.testing.assert_allclose(w, G * (np.arange(G) == best[:, None]), **ALIKE)


@pytest.mark.parametrize("config", [EGSW, STEP], ids=["trajectory", "step"])
def test_only_differences_within_a_group_matter(config):
    w = compute(config)
    shift = np.array([3.0, -2.0, 40.0])
    np.testing.assert_allclose(compute(config, X.advantages + shift[:, None]), w, rtol=1e-10)
    np.testing.assert_allclose(compute(config, H=X.entropy + shift[:, None, None]), w, rtol=1e-10)
    equal = compute(dataclasses.replace(config, alpha=0.0), np.ones((Q, G)))
    np.testing.assert_array_equal(equal, X.mask if config is STEP else np.ones((Q, G)))


def test_weight_grows_with_advantage_and_with_entropy():
    w, A, H = compute(EGSW), X.advantages.copy(), X.entropy.copy()
    A[1, 2] += 0.1
    H[2, 3] += 0.1
    moved = compute(EGSW, A, H) - w
    assert moved[1, 2] > 0 and moved[2, 3] > 0 and not moved[0].any()
    assert (np.delete(moved[1], 2) < 0).all() and (np.delete(moved[2], 3) < 0).all()


@pytest.mark.parametrize("config", [EGSW, STEP], ids=["trajectory", "step"])
def test_order_padding_and_absent_rows_change_nothing(config):
    w, order = compute(config), np.array([4, 2, 0, 3, 1])
    permuted = compute(config, X.advantages[:, order], X.entropy[:, order], X.mask[:, order])
    np.testing.assert_allclose(permuted, w[:, order], **ALIKE)
    longer = [
        np.pad(x, [(0, 0), (0, 2), (0, 3)], constant_values=fill)
        for x, fill in ((X.entropy, np.inf), (X.mask, 0))
    ]
    A = np.pad(X.advantages, [(0, 0), (0, 2)], constant_values=np.nan)
    wider = compute(config, A, *longer)
    np.testing.assert_allclose(wider[:, :G, :N] if config is STEP else wider[:, :G], w, **ALIKE)
    assert not wider[:, G:].any()
    rows = np.arange(G)[None] != np.array([[2], [0], [4]])
    left_out = compute(config, rows=jnp.asarray(rows))
    np.testing.assert_allclose(left_out, compute(config, mask=X.mask & rows[..., None]), **ALIKE)


def test_with_one_token_the_two_modes_are_one():
    one = {"H": X.entropy[..., :1], "mask": X.mask[..., :1]}
    np.testing.assert_allclose(compute(STEP, **one)[..., 0], compute(EGSW, **one), **ALIKE)


@pytest.mark.smoke
@pytest.mark.parametrize("config", [EGSW, STEP], ids=["trajectory", "step"])
def test_an_empty_group_gives_zeros_and_finite_gradients(config):
    config = dataclasses.replace(config, stop_gradient=False, entropy_source="current", temperature=1e-3)
    mask = X.mask & (np.arange(Q) != 1)[:, None, None]
    H = spoiled(X.entropy, np.nan, mask).astype(np.float32)

    def total(H):
        w = sequence_weights(config, X.advantages, H, mask)
        return jnp.square(w).sum(), w

    (value, w), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(H)
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[~mask].any()
    assert not w[1].any() and w[::2].any()


@pytest.mark.parametrize("config", [EGSW, STEP], ids=["trajectory", "step"])
def test_gradients_reach_the_entropy_only_if_asked(config):
    L = np.random.default_rng(5).standard_normal((Q, G, N) if config is STEP else (Q, G))

    def total(A, H, config):
        return (L * sequence_weights(config, A, H, X.mask)).sum()

    gradient = jax.jit(jax.grad(total, (0, 1)), static_argnums=2)
    assert not any(g.any() for g in gradient(jnp.asarray(X.advantages), jnp.asarray(X.entropy), config))
    config = dataclasses.replace(config, stop_gradient=False)
    dA, dH = gradient(jnp.asarray(X.advantages), jnp.asarray(X.entropy), config)
    w, n = compute(config), X.mask.sum(1, keepdims=True) if config.mode == "step" else G
    want = w * (L - (w * L).sum(1, keepdims=True) / np.maximum(n, 1)) * config.alpha / config.temperature
    if want.ndim == 2:  # each token has its share of the mean
        want = np.where(X.mask, (want / LENGTHS)[..., None], 0)
    np.testing.assert_allclose(dH, want, rtol=1e-10, atol=1e-12)
    assert not dA.any()


def test_expansion_for_large_temperatures():
    """G w = 1 + (A - mean A) / P + alpha (H - mean H) / P up to about 0.4 / P^2 for unit-variance A."""
    A = X.advantages - X.advantages.mean(1, keepdims=True)
    A /= A.std(1, ddof=1, keepdims=True)
    H = np.where(X.mask, X.entropy, 0).sum(-1) / LENGTHS
    first = A + EGSW.alpha * (H - H.mean(1, keepdims=True))
    errors = []
    for P in (20.0, 40.0):
        w = compute(dataclasses.replace(EGSW, temperature=P), A)
        errors.append(np.abs(w - 1 - first / P).max() * P**2)
    assert 0.1 < errors[1] < 3 and abs(errors[0] / errors[1] - 1) < 0.1


@pytest.mark.parametrize(
    ("successes", "P", "ratio", "ess"), [(1, 1.0, 16.9, 0.24), (4, 2.0, 2.55, None), (7, 4.0, 2.03, None)]
)
def test_published_table_of_binary_rewards(successes, P, ratio, ess):
    r = (np.arange(8) < successes) * 1.0
    A = ((r - r.mean()) / r.std(ddof=1))[None]
    config = SequenceWeightConfig(name="egsw", alpha=0.0, temperature=P)
    H, mask = np.zeros((1, 8, 1)), np.ones((1, 8, 1), bool)
    w = compute(config, A, H, mask)
    np.testing.assert_allclose(w[0, 0] / w[0, -1], ratio, rtol=5e-3)
    said = say(config, w, A, H, mask)
    if ess:
        assert said["ess"] == pytest.approx(ess, abs=5e-3)
    assert said["mass_positive"] == pytest.approx(w[0, :successes].sum() / 8)
    assert said["corr_adv"] == pytest.approx(1)
    assert said["corr_entropy"] == said["share_of_entropy_term"] == 0


@pytest.mark.parametrize("config", [EGSW, STEP], ids=["trajectory", "step"])
def test_statistics_equal_numpy(config):
    w = compute(config, mask=HOLES)
    said = say(config, w, X.advantages, X.entropy, HOLES)
    H_row = np.where(HOLES, X.entropy, 0).sum(-1) / np.maximum(HOLES.sum(-1), 1)
    columns = []  # weights, A, H of the members of each group (at each token)
    for q in range(Q):
        for t in range(N if config is STEP else 1):
            i = HOLES[q, :, t] if config is STEP else HOLES[q].any(-1)
            if i.any():
                H = X.entropy[q, i, t] if config is STEP else H_row[q, i]
                columns.append((w[q, i, t] if config is STEP else w[q, i], X.advantages[q, i], H))
    centred = [np.concatenate([c[k] - c[k].mean() for c in columns]) for k in range(3)]
    H_there = H_row[HOLES.any(-1)]
    want = {
        "weight_min": min(c[0].min() for c in columns),
        "weight_max": max(c[0].max() for c in columns),
        "ess": np.mean([1 / (len(c[0]) * ((c[0] / c[0].sum()) ** 2).sum()) for c in columns]),
        "entropy_seq_mean": H_there.mean(),
        "entropy_seq_std": H_there.std(),
        "mass_positive": np.mean([c[0][c[1] > 0].sum() / c[0].sum() for c in columns]),
        "corr_adv": np.corrcoef(centred[0], centred[1])[0, 1],
        "corr_entropy": np.corrcoef(centred[0], centred[2])[0, 1],
        "share_of_entropy_term": config.alpha * centred[2].std() / centred[1].std(),
    }
    assert said == pytest.approx(want, rel=1e-10)


def test_statistics_of_nothing_are_finite():
    nothing = np.zeros_like(X.mask)
    said = say(EGSW, compute(EGSW, mask=nothing), X.advantages, X.entropy, nothing)
    assert all(np.isfinite(x) for x in said.values())


def test_registry_and_options_that_need_more():
    assert tuple(SEQUENCE_WEIGHTS) == WEIGHT_NAMES
    with pytest.raises(ValueError, match="vocab_size=0"):
        sequence_weights(dataclasses.replace(EGSW, entropy_norm="log_vocab"), X.advantages, X.entropy, X.mask)
    with pytest.raises(ValueError, match="advantages"):
        sequence_weights(EGSW, X.advantages.ravel(), X.entropy, X.mask)
