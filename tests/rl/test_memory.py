"""What GRPO remembers moves when it should and as it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.rl.config import CurriculumConfig, EntropyBonusConfig, GRPOConfig, KLConfig
from attnlab.rl.memory import after_step, after_update, coefficient_of, init_memory, level_of

PARAMS = {"w": jnp.array([1.0, 2.0])}


def test_plain_grpo_remembers_nothing():
    assert init_memory(GRPOConfig(), PARAMS) == {}
    assert level_of(GRPOConfig(curriculum=CurriculumConfig(level=3)), {}) == 3


def test_the_reference_follows_every_so_many_steps():
    options = GRPOConfig(kl=KLConfig(beta=0.1, sync_steps=2, sync_mix=0.25))
    memory, policy = init_memory(options, PARAMS), {"w": jnp.array([5.0, 10.0])}
    first = after_step(options, memory, policy, 0, 0.5, 1)
    np.testing.assert_array_equal(first["reference"]["w"], PARAMS["w"])
    second = after_step(options, first, policy, 1, 0.5, 1)
    np.testing.assert_allclose(second["reference"]["w"], [2.0, 4.0])  # 1/4 of the policy


def test_an_adaptive_bonus_rises_below_its_target_and_rests_above():
    options = GRPOConfig(
        entropy_bonus=EntropyBonusConfig(coefficient=0.01, adaptive=True, target=0.5, delta=0.004)
    )
    memory = init_memory(options, PARAMS)
    assert coefficient_of(options, memory) == pytest.approx(0.01)
    low = after_update(options, memory, jnp.float32(0.2))
    assert coefficient_of(options, low) == pytest.approx(0.014)
    high = after_update(options, low, jnp.float32(0.9))
    assert coefficient_of(options, high) == 0 and high["coefficient"] == pytest.approx(0.01)


def test_the_curriculum_follows_success():
    options = GRPOConfig(curriculum=CurriculumConfig(level=2, enabled=True, decay=0.0))
    memory = jax.jit(lambda params: init_memory(options, params))(PARAMS)
    assert level_of(options, after_step(options, memory, PARAMS, 0, 0.9, 5)) == 3
    assert level_of(options, after_step(options, memory, PARAMS, 0, 0.1, 5)) == 1
    assert level_of(options, after_step(options, memory, PARAMS, 0, 0.5, 5)) == 2
    assert level_of(options, after_step(options, memory, PARAMS, 0, 0.9, 2)) == 2  # there is no third level
