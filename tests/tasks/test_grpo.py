"""GRPO runs in the trainer: resumed to the bit, alike on every mesh, with every part in use; bad input is survived."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from attnlab.config import ConfigError
from attnlab.experiment import open_task
from attnlab.rl.config import (
    AdvantageConfig,
    CorrectionConfig,
    CurriculumConfig,
    EntropyBonusConfig,
    KLConfig,
    PolicyLossConfig,
    RLWarning,
    RolloutConfig,
    SequenceWeightConfig,
)
from attnlab.training.checkpoints import CheckpointConfig
from attnlab.training.sharding import MeshConfig
from tests.tasks.runs import change, experiment, metrics, run

pytestmark = pytest.mark.filterwarnings("ignore::attnlab.rl.config.RLWarning")

# What has a memory: a moving reference, an adaptive bonus, a curriculum; several updates a rollout.
EVENTFUL = {
    "iterations": 2,
    "minibatches": 2,
    "weights": SequenceWeightConfig(name="egsw"),
    "kl": KLConfig(beta=0.1, sync_steps=2),
    "entropy_bonus": EntropyBonusConfig(coefficient=0.01, adaptive=True),
    "curriculum": CurriculumConfig(level=2, enabled=True, decay=0.0, up=0.9, down=0.1),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Four steps on one device."""
    workdir = tmp_path_factory.mktemp("unbroken")
    run(experiment(EVENTFUL), workdir, jax.devices()[:1])
    return workdir


def test_a_run_tells_what_it_did(unbroken):
    found = metrics(unbroken)
    assert sorted(found) == [1, 2, 3, 4]
    first, last = found[1], found[4]
    names = (
        "reward",
        "rewards/exact/mean",
        "rewards/tests.tasks.runs:printable/std",
        "frac_reward_zero_std",
        "entropy",
        "kl",
    )
    names += (
        "egsw/ess",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "sampling/logp_diff_max",
        "grad_norm",
    )
    assert {f"train/{name}" for name in names} <= first.keys()
    assert first["train/sampling/logp_diff_max"] < 1e-4
    assert first["train/ratio/mean"] != 1  # the second pass is off-policy
    assert first["train/curriculum/level"] == 2 and last["train/curriculum/level"] == 1  # nothing was solved
    assert first["train/entropy_coefficient"] == pytest.approx(
        0.0
    )  # entropies above the target: down, 4 x 0.005
    lines = [json.loads(line) for line in (unbroken / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 4 * 4 and lines[0]["prompt"].endswith("=")
    assert {"text", "rewards", "advantage", "entropy", "weight", "tokens"} <= lines[0].keys()
    assert (unbroken / "eval" / "problems.json").exists()


def test_resumed_run_equals_the_unbroken_one_to_the_bit(unbroken, tmp_path):
    """Stopped after two steps; the reference policy was synchronised there."""
    whole = experiment(EVENTFUL)
    run(change(whole, steps=2), tmp_path, jax.devices()[:1])
    (tmp_path / "completions.jsonl").open("a").write('{"step": 3, "of": "a step that was not saved"}\n{"cut')
    assert run(whole, tmp_path, jax.devices()[:1]).reason == "complete"
    assert metrics(tmp_path) == metrics(unbroken)
    assert (tmp_path / "completions.jsonl").read_text() == (unbroken / "completions.jsonl").read_text()


MESHES = {
    "data": MeshConfig(data=8),
    "data_fsdp_tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_meshes_and_micro_batches_give_what_one_device_gives(name, accumulate, tmp_path):
    """Whole groups to a device and to a micro-batch; the same completions, losses and gradients."""
    options = {
        "weights": SequenceWeightConfig(name="egsw", entropy_source="current"),
        "kl": KLConfig(beta=0.1),
    }
    given = dataclasses.replace(experiment(options, steps=3))
    given = dataclasses.replace(given, data=dataclasses.replace(given.data, batch_size=16))
    run(given, tmp_path / "one", jax.devices()[:1])
    run(change(given, mesh=MESHES[name], accumulate=accumulate), tmp_path / "many")
    one, many = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    for step, name in [(s, n) for s in one for n in ("reward", "loss", "grad_norm", "entropy", "kl")]:
        np.testing.assert_allclose(
            many[step][f"train/{name}"], one[step][f"train/{name}"], rtol=2e-3, atol=1e-6
        )
    assert one[1]["train/reward"] == many[1]["train/reward"]


VARIANTS = {
    "dapo": {
        "aggregation": "token_mean",
        "policy_loss": PolicyLossConfig(eps_high=0.28),
        "dynamic_sampling": True,
        "overlong_cache": 2,
        "rewards": "tests.tasks.runs:digit + length_penalty",
    },
    "dr_grpo": {"aggregation": "seq_sum_const", "advantage": AdvantageConfig(name="none")},
    "gspo": {"policy_loss": PolicyLossConfig(name="gspo", eps_low=3e-4, eps_high=4e-4), "minibatches": 2},
    "rloo_kl_in_reward": {
        "advantage": AdvantageConfig(name="rloo"),
        "kl": KLConfig(beta=0.05, in_reward=True),
    },
    "cispo_corrected": {
        "policy_loss": PolicyLossConfig(name="cispo"),
        "correction": CorrectionConfig(name="token_truncate", top_entropy=0.5, off_policy_threshold=0.1),
        "advantage": AdvantageConfig(name="per_reward", entropy_bonus=0.4),
    },
    "step_weights": {"weights": SequenceWeightConfig(name="egsw", mode="step", entropy_source="current")},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("dapo",) else pytest.mark.thorough) for n in VARIANTS]
)
def test_every_recipe_trains(name, tmp_path):
    summary = run(experiment(VARIANTS[name], steps=2), tmp_path, jax.devices()[:1])
    found = metrics(tmp_path)
    assert summary.reason == "complete" and found[2]["train/nonfinite"] == 0
    assert found[1]["train/grad_norm"] > 0 or found[1]["train/frac_reward_zero_std"] == 1
    if name == "dapo":
        assert found[1]["train/gen_batches_per_step"] > 1  # every other group has no digit
        assert found[1]["train/frac_reward_zero_std"] == 0


def broken(prompts, texts, **_):
    """A reward that knows most prompts not, and throws at the third batch."""
    broken.calls = getattr(broken, "calls", 0) + 1
    if broken.calls == 3:
        raise RuntimeError("no answer from the judge")
    return [float(len(text)) if prompt < "5" else None for prompt, text in zip(prompts, texts, strict=True)]


def test_bad_rewards_are_counted_and_survived(tmp_path):
    """Rewards that do not apply, a scorer that throws, completions of nothing but the end."""
    options = {"rewards": "tests.tasks.test_grpo:broken"}
    run(experiment(options, steps=3), tmp_path, jax.devices()[:1])
    found = metrics(tmp_path)
    assert 0 < found[1]["train/unscorable"] < 1 and found[3]["train/unscorable"] == 1
    assert found[3]["train/rewards/tests.tasks.test_grpo:broken/errors"] == 1
    assert all(values["train/nonfinite"] == 0 for values in found.values())
    assert found[3]["train/grad_norm"] == 0


def test_prompts_too_long_are_passed_over_and_counted(tmp_path):
    prompts = [f"{number:03d}" + "0" * 9 * (number % 2) for number in range(40)]
    rows = [{"prompt": prompt, "answer": "1"} for prompt in prompts]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"problems": f"jsonl:{path}", "rewards": "accuracy"}
    given = experiment(options | {"rollout": RolloutConfig(max_prompt_tokens=6, max_new_tokens=2)}, steps=1)
    task = open_task(given)
    problems, prompts, _ = task.explorer.prompter.batch(range(8), 0, 0.0)
    assert task.explorer.prompter.too_long > 0 and prompts.shape == (8, 6)
    assert all(len(problem.question) == 3 for problem in problems)


def test_nearly_all_groups_alike_is_warned_of(tmp_path):
    options = {"rewards": "exact", "rollout": RolloutConfig(max_prompt_tokens=6, max_new_tokens=1)}
    with pytest.warns(RLWarning, match="of the groups have rewards all alike"):
        run(experiment(options, steps=1, checkpoint=CheckpointConfig(every=5)), tmp_path, jax.devices()[:1])


def test_a_run_begins_with_anothers_parameters(unbroken, tmp_path):
    given = dataclasses.replace(experiment(steps=1), init_from=str(unbroken))
    mesh = jax.make_mesh((1, 1, 1, 1), ("data", "fsdp", "sequence", "tensor"), devices=jax.devices()[:1])
    params = open_task(given).initial_params(mesh)
    fresh = open_task(given).objective.init(jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(fresh), strict=True))
    other = dataclasses.replace(given, model=dataclasses.replace(given.model, hidden_size=64))
    with pytest.raises(ConfigError, match="hidden_size=32, which do not fit 64"):
        open_task(other).initial_params(mesh)
