"""Options of GRPO that make no sense are refused or warned of, with the reason."""

import dataclasses
import warnings

import pytest

from attnlab.rl.config import (
    AdvantageConfig,
    CorrectionConfig,
    CurriculumConfig,
    EntropyBonusConfig,
    GRPOConfig,
    KLConfig,
    PolicyLossConfig,
    RLWarning,
    RolloutConfig,
    SequenceWeightConfig,
)

REFUSED = {
    "a group of one": (GRPOConfig(group_size=1), "group_size=1"),
    "an unknown aggregation": (GRPOConfig(aggregation="mean"), "choose one of seq_mean_token_mean"),
    "an unknown advantage": (GRPOConfig(advantage=AdvantageConfig(name="z")), "choose one of group"),
    "P of 0": (GRPOConfig(weights=SequenceWeightConfig(temperature=0.0)), "temperature=0.0 must be positive"),
    "a gradient through data": (
        GRPOConfig(weights=SequenceWeightConfig(stop_gradient=False)),
        "needs entropy_source='current'",
    ),
    "clip-higher lower": (GRPOConfig(policy_loss=PolicyLossConfig(eps_low=0.3)), "is below eps_low=0.3"),
    "a cap within the clip": (
        GRPOConfig(policy_loss=PolicyLossConfig(ratio_cap=1.1)),
        "must exceed 1 [+] eps_high",
    ),
    "a reference never used": (GRPOConfig(kl=KLConfig(sync_steps=5)), "sync_steps=5 has no effect without"),
    "KL twice": (
        GRPOConfig(kl=KLConfig(beta=0.1, in_reward=True, is_correct=True)),
        "has no effect with in_reward",
    ),
    "greedy rollouts": (GRPOConfig(rollout=RolloutConfig(temperature=0.0)), "greedy rows are all alike"),
    "a bonus above its most": (
        GRPOConfig(entropy_bonus=EntropyBonusConfig(coefficient=2.0)),
        "exceeds most=1.0",
    ),
    "no tokens": (GRPOConfig(correction=CorrectionConfig(top_entropy=1.0)), r"must lie in \[0, 1\)"),
    "a curriculum upside down": (GRPOConfig(curriculum=CurriculumConfig(up=0.1)), "must be below up=0.1"),
    "a length never used": (GRPOConfig(loss_length=9), "loss_length has no effect: aggregation="),
    "rows never counted": (
        GRPOConfig(count_empty_rows=True, aggregation="token_mean"),
        "does not count rows",
    ),
    "a cache never used": (GRPOConfig(overlong_cache=4), "have no length_penalty"),
    "a weighted KL of nothing": (
        GRPOConfig(weights=SequenceWeightConfig(name="egsw", weight_kl=True)),
        "kl.beta above 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        options.validate()


WARNED = {
    "gspo by tokens": (
        GRPOConfig(policy_loss=PolicyLossConfig(name="gspo"), aggregation="token_mean"),
        "loses GSPO's per-sequence objective",
    ),
    "filtered rollouts": (GRPOConfig(rollout=RolloutConfig(top_k=5)), "biases the policy gradient"),
    "off-policy reinforce": (
        GRPOConfig(policy_loss=PolicyLossConfig(name="reinforce"), iterations=2),
        "does not correct for the 2 updates",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_warned_of(name):
    options, message = WARNED[name]
    with pytest.warns(RLWarning, match=message):
        options.validate()


def test_the_papers_options_pass_in_silence():
    egsw = GRPOConfig(weights=SequenceWeightConfig(name="egsw"), kl=KLConfig(beta=0.04))
    dapo = GRPOConfig(
        aggregation="token_mean",
        policy_loss=PolicyLossConfig(eps_high=0.28),
        rewards="exact + length_penalty",
        overlong_cache=16,
        mask_truncated=True,
        dynamic_sampling=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in (GRPOConfig(), egsw, dapo, dataclasses.replace(egsw, iterations=2, minibatches=4)):
            options.validate()
