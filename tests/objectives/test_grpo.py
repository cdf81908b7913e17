"""The GRPO objective: a bandit is learnt with every loss, and sums of micro-batches are those of the whole batch.

Letters: Q prompts, G completions of each, N completion length.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.models.config import ModelConfig
from attnlab.objectives.grpo import GRPO, finish_batch
from attnlab.objectives.objective import average
from attnlab.rl.config import (
    CorrectionConfig,
    EntropyBonusConfig,
    GRPOConfig,
    KLConfig,
    PolicyLossConfig,
    RolloutConfig,
    SequenceWeightConfig,
)
from attnlab.rl.experience import make_experience
from attnlab.rl.rollout import Rollout, roll_out
from attnlab.training.optimizer import OptimizerConfig, make_optimizer
from attnlab.training.state import init_state, summed_gradients, train_step
from attnlab.training.trees import named_leaves


def model(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        layers="softmax", num_layers=1, hidden_size=16, num_heads=2, mlp_size=16, vocab_size=vocab_size
    )


def bandit(loss: str) -> GRPOConfig:
    """Two arms, one pull: the first token is the whole completion."""
    rollout = RolloutConfig(max_prompt_tokens=1, max_new_tokens=1)
    return GRPOConfig(group_size=8, rollout=rollout, policy_loss=PolicyLossConfig(name=loss, cispo_max=1.2))


LOSSES = [
    "clip",
    *(pytest.param(name, marks=pytest.mark.thorough) for name in ("gspo", "cispo", "reinforce")),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_bandit_is_learnt(loss):
    options = bandit(loss)
    objective = GRPO(model(3), options)  # arms 0 and 1; padding is 2
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.0))
    prompts, starts, groups = jnp.zeros((4, 1), jnp.int32), jnp.zeros(4, jnp.int32), jnp.ones(4, bool)

    @jax.jit
    def step(state, key):
        given = (objective.module, state.params, prompts, starts, key, jnp.arange(4), options.rollout, 8)
        drawn = roll_out(*given, stop_ids=(), pad_id=2)
        rewards = (drawn.ids[:, :, 0] == 1).astype(jnp.float32)[..., None]
        experience = (
            objective.module,
            state.params,
            None,
            prompts,
            starts,
            drawn,
            rewards,
            groups,
            jnp.ones(1),
        )
        batch, metrics = make_experience(options, *experience)
        batch = finish_batch(options, batch, jnp.float32(0))
        learn = functools.partial(train_step, objective=objective, optimizer=optimizer, parts=1)
        state, scalars = learn(state, batch, schedule=lambda step: 3e-3)
        return state, metrics["reward"], scalars

    state, key, rewards = init_state(objective, optimizer, 0), jax.random.key(1), []
    for index in range(99):
        state, reward, scalars = step(state, jax.random.fold_in(key, index))
        rewards.append(float(reward))
        if loss == "clip" and index == 0:
            assert abs(float(scalars["policy_loss"])) < 1e-6 < float(scalars["grad_norm"])
    assert rewards[0] < 0.8 and np.mean(rewards[-10:]) > 0.95


def batch_of(options: GRPOConfig, objective: GRPO, params, seed: int = 0):
    """What a rollout of Q = 4 groups that was drawn by no policy at all teaches; completions of many lengths."""
    rng, (Q, G, P, N) = np.random.default_rng(seed), (4, options.group_size, 3, 5)
    lengths = rng.integers(1, N + 1, (Q, G))
    mask = np.arange(N) < lengths[..., None]
    ids = np.where(mask, rng.integers(0, 10, (Q, G, N)), 10)
    logp = np.where(mask, rng.normal(-2, 1, (Q, G, N)), 0).astype(np.float32)
    drawn = Rollout(ids, mask, logp, logp, lengths == N, lengths)
    rewards = rng.random((Q, G, 2)).astype(np.float32)
    rewards[1, 2, 0] = np.nan
    prompts, starts = rng.integers(0, 10, (Q, P)), np.array([0, 1, 2, 0])
    given = (
        objective.module,
        params,
        params,
        prompts,
        starts,
        drawn,
        rewards,
        np.ones(Q, bool),
        np.array([1.0, 0.5]),
    )
    batch, metrics = jax.jit(functools.partial(make_experience, options, objective.module))(*given[1:])
    return finish_batch(options, batch, jnp.float32(options.entropy_bonus.coefficient)), metrics


EVERYTHING = GRPOConfig(
    group_size=3,
    iterations=2,
    mask_truncated=True,
    rollout=RolloutConfig(max_prompt_tokens=3, max_new_tokens=5, temperature=0.7),
    weights=SequenceWeightConfig(name="egsw"),
    kl=KLConfig(beta=0.1, is_correct=True),
    entropy_bonus=EntropyBonusConfig(coefficient=0.1),
    correction=CorrectionConfig(name="token_truncate", off_policy_threshold=0.5, top_entropy=0.5),
)
CASES = {
    "everything": EVERYTHING,
    "token_mean": dataclasses.replace(EVERYTHING, aggregation="token_mean"),
    "current_step_weights": dataclasses.replace(
        EVERYTHING,
        aggregation="seq_sum_const",
        weights=SequenceWeightConfig(
            name="egsw", mode="step", entropy_source="current", stop_gradient=False, weight_kl=True
        ),
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_add_up_to_the_whole_batch(name):
    """1 x 4, 2 x 2 and 4 x 1 groups: the same loss and the same gradient of every parameter."""
    options = CASES[name]
    objective = GRPO(model(11), options)
    params = objective.init(jax.random.key(0))
    batch, _ = batch_of(options, objective, params)
    found = {}
    for parts in (1, 2, 4):
        run = jax.jit(functools.partial(summed_gradients, objective, parts=parts))
        grads, terms = run(params, batch, jax.random.key(1))
        scale = 1 / jnp.maximum(terms.weight, 1e-9)
        found[parts] = (average(terms), named_leaves(jax.tree.map(lambda g, scale=scale: g * scale, grads)))
    for parts in (2, 4):
        for metric in ("loss", "policy_loss", "entropy", "kl", "clip_ratio/region_mean"):
            np.testing.assert_allclose(
                found[parts][0][metric], found[1][0][metric], rtol=2e-5, err_msg=metric
            )
        for leaf, value in found[1][1].items():
            size = float(jnp.abs(value).max())
            np.testing.assert_allclose(found[parts][1][leaf], value, atol=2e-5 * size, err_msg=leaf)
    assert max(float(jnp.abs(value).max()) for value in found[1][1].values()) > 0


def test_padding_groups_change_nothing():
    """A group marked as padding gives the loss, the gradient and the statistics of the batch without it."""
    options = dataclasses.replace(EVERYTHING, correction=CorrectionConfig())
    objective = GRPO(model(11), options)
    params = objective.init(jax.random.key(0))
    whole, _ = batch_of(options, objective, params)
    gradient = jax.jit(functools.partial(summed_gradients, objective, parts=1))

    def without(batch):
        """The last group as padding, whatever it holds."""
        kept = jnp.arange(4) < 3
        empty = batch | {"mask": batch["mask"] & kept[:, None, None], "rows": batch["rows"] & kept[:, None]}
        empty["weights"] = jnp.where(kept[:, None], batch["weights"], jnp.nan)
        empty["old_logp"] = jnp.where(kept[:, None, None], batch["old_logp"], jnp.nan)
        return finish_batch(options, empty, jnp.float32(0.1))

    cut = jax.tree.map(lambda x: x[:3], whole)
    expected, terms = gradient(params, finish_batch(options, cut, jnp.float32(0.1)), jax.random.key(0))
    found, found_terms = gradient(params, without(whole), jax.random.key(0))
    np.testing.assert_allclose(found_terms.loss_sum, terms.loss_sum, rtol=1e-6)
    assert found_terms.weight == terms.weight
    for name, value in named_leaves(expected).items():
        np.testing.assert_allclose(named_leaves(found)[name], value, rtol=1e-4, atol=1e-7, err_msg=name)


def test_metrics_of_an_experience():
    options = EVERYTHING
    objective = GRPO(model(11), options)
    params = objective.init(jax.random.key(0))
    _, metrics = batch_of(options, objective, params)
    assert {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "completions/clipped_ratio",
        "egsw/ess",
    } <= metrics.keys()
    assert 0 < metrics["completions/clipped_ratio"] < 1 and metrics["completions/max_terminated_length"] <= 4
    assert metrics["completions/max_length"] == 5 and metrics["is_ratio/max"] <= 2
    assert metrics["sampling/logp_diff_max"] > 0.1  # no policy drew these
