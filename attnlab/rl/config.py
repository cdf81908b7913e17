"""Options of GRPO and of everything that can be put in its places, with the defaults of the GRPO and EGSW papers.

Sources: GRPO arXiv 2402.03300, EGSW 2503.22456, DAPO 2503.14476, Dr.GRPO 2503.20783, RLOO 2402.14740, GSPO 2507.18071,
CISPO 2506.13585, GDPO (per-reward advantages), TR-DPO (reference synchronisation), Skywork-OR1 (adaptive entropy).
"""

import dataclasses
import math
import warnings

ADVANTAGE_NAMES = ("group", "batch", "none", "rloo", "per_reward")
WEIGHT_NAMES = ("none", "egsw")
LOSS_NAMES = ("clip", "gspo", "cispo", "reinforce")
AGGREGATION_NAMES = ("seq_mean_token_mean", "token_mean", "seq_sum_const", "seq_mean_token_sum")
KL_NAMES = ("k1", "k2", "k3", "abs", "k3_plus")
CORRECTION_NAMES = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


class RLWarning(UserWarning):
    """A combination of options, or a run's state, that works but probably is not what was wanted."""


def _choose(where: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{where}={value!r} is unknown; choose one of {', '.join(names)}")


def _at_least(where: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{where}={value} must be finite and at least {least}")


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """Rewards to advantages."""

    name: str = "group"
    eps: float = 1e-4  # added to the standard deviation
    ddof: int = 1
    clip: float = 0.0  # advantages are cut to [-clip, clip]; 0: off
    entropy_bonus: float = 0.0  # a of A + min(a H, |A| / entropy_bonus_cap), arXiv 2506.14758; 0: off
    entropy_bonus_cap: float = 2.0  # kappa there, above 1 so that no sign turns

    def validate(self) -> None:
        _choose("grpo.advantage.name", self.name, ADVANTAGE_NAMES)
        for name in ("eps", "clip", "entropy_bonus"):
            _at_least(f"grpo.advantage.{name}", getattr(self, name), 0)
        if self.ddof not in (0, 1):
            raise ValueError(f"grpo.advantage.ddof={self.ddof} must be 0 or 1")
        if self.entropy_bonus_cap <= 1:
            raise ValueError(f"grpo.advantage.entropy_bonus_cap={self.entropy_bonus_cap} must be above 1")


@dataclasses.dataclass(frozen=True)
class SequenceWeightConfig:
    """How completions of a group are weighted against each other (EGSW)."""

    name: str = "none"
    mode: str = (
        "trajectory"  # one weight a completion; "step": one a token, over the rows alive at that index
    )
    alpha: float = 0.5  # of the entropy against the advantage
    temperature: float = 2.0  # P; infinity gives plain GRPO
    scale: str = "group"  # weights average 1; "unit": they sum to 1, as printed
    stop_gradient: bool = True
    entropy_source: str = "old"  # the policy that made the rollout; "current": the one being updated
    entropy_agg: str = "mean"  # over a completion's tokens; or "sum", "max"
    entropy_norm: str = "none"  # or "log_vocab": entropies divided by ln V
    step_members: str = "alive"  # or "all": finished rows stay in a step's group with entropy 0
    weight_kl: bool = False

    def validate(self) -> None:
        choices = {
            "name": WEIGHT_NAMES,
            "mode": ("trajectory", "step"),
            "scale": ("group", "unit"),
            "entropy_source": ("old", "current"),
            "entropy_agg": ("mean", "sum", "max"),
            "entropy_norm": ("none", "log_vocab"),
            "step_members": ("alive", "all"),
        }
        for name, names in choices.items():
            _choose(f"grpo.weights.{name}", getattr(self, name), names)
        if not self.temperature > 0:
            raise ValueError(
                f"grpo.weights.temperature={self.temperature} must be positive (it may be infinite)"
            )
        if not math.isfinite(self.alpha):
            raise ValueError(f"grpo.weights.alpha={self.alpha} must be finite")
        if not self.stop_gradient and self.entropy_source == "old":
            raise ValueError(
                "grpo.weights.stop_gradient=False needs entropy_source='current': the old policy's entropy is data"
            )


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
    """The per-token surrogate."""

    name: str = "clip"
    eps_low: float = 0.2
    eps_high: float = 0.2  # DAPO: 0.28; GSPO: 3e-4 and 4e-4
    ratio_cap: float = 0.0  # two-sided (dual) clip: the ratio is at most this where A < 0; 0: off
    cispo_min: float = 0.0  # bounds of CISPO's ratio themselves
    cispo_max: float = 5.0
    log_ratio_clamp: float = 20.0  # of log-ratios before exp

    def validate(self) -> None:
        _choose("grpo.policy_loss.name", self.name, LOSS_NAMES)
        for name in ("eps_low", "eps_high", "ratio_cap", "cispo_min"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"grpo.policy_loss.{name}={getattr(self, name)} must not be negative")
        if self.eps_high < self.eps_low:
            raise ValueError(
                f"grpo.policy_loss.eps_high={self.eps_high} is below eps_low={self.eps_low}; clip-higher needs it above"
            )
        if self.ratio_cap and self.ratio_cap <= 1 + self.eps_high:
            raise ValueError(
                f"grpo.policy_loss.ratio_cap={self.ratio_cap} must exceed 1 + eps_high={1 + self.eps_high}; 0: off"
            )
        if self.cispo_max <= self.cispo_min:
            raise ValueError(
                f"grpo.policy_loss.cispo_max={self.cispo_max} must exceed cispo_min={self.cispo_min}"
            )
        if not self.log_ratio_clamp > 0:
            raise ValueError(f"grpo.policy_loss.log_ratio_clamp={self.log_ratio_clamp} must be positive")


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """Distance to a frozen reference policy; with beta 0 no reference is held."""

    beta: float = 0.0
    estimator: str = "k3"
    is_correct: bool = False  # multiply by the ratio, whose gradient flows
    in_reward: bool = (
        False  # beta * sum of (old - reference) is taken off the reward instead of added to the loss
    )
    sync_steps: int = 0  # every so many steps reference <- mix * policy + (1 - mix) * reference; 0: never
    sync_mix: float = 0.6

    def validate(self) -> None:
        _choose("grpo.kl.estimator", self.estimator, KL_NAMES)
        _at_least("grpo.kl.beta", self.beta, 0)
        _at_least("grpo.kl.sync_steps", self.sync_steps, 0)
        if not 0 < self.sync_mix <= 1:
            raise ValueError(f"grpo.kl.sync_mix={self.sync_mix} must lie in (0, 1]")
        for name in ("is_correct", "in_reward", "sync_steps"):
            if getattr(self, name) and not self.beta:
                raise ValueError(f"grpo.kl.{name}={getattr(self, name)} has no effect without grpo.kl.beta")
        if self.in_reward and self.estimator != "k3":
            raise ValueError(
                f"grpo.kl.estimator={self.estimator!r} has no effect with in_reward=True; leave it at k3"
            )
        if self.in_reward and self.is_correct:
            raise ValueError("grpo.kl.is_correct=True has no effect with in_reward=True; choose one of them")


@dataclasses.dataclass(frozen=True)
class EntropyBonusConfig:
    """loss -= coefficient * mean entropy of the scored tokens."""

    coefficient: float = 0.0  # where it starts, if adaptive
    adaptive: bool = False  # after each update: + delta if entropy <= target, else - delta (Skywork-OR1)
    target: float = 0.2  # nats
    delta: float = 0.005
    most: float = 1.0

    def validate(self) -> None:
        for name in ("coefficient", "target", "delta", "most"):
            _at_least(f"grpo.entropy_bonus.{name}", getattr(self, name), 0)
        if self.coefficient > self.most:
            raise ValueError(
                f"grpo.entropy_bonus.coefficient={self.coefficient} exceeds most={self.most}; lower it"
            )


@dataclasses.dataclass(frozen=True)
class CorrectionConfig:
    """What is done about a rollout whose log-probabilities are not the trainer's, and which tokens count."""

    name: str = "none"
    least: float = 0.5  # "token_mask", "sequence_mask": ratios below give 0
    most: float = 2.0  # C
    off_policy_threshold: float = (
        0.0  # rows with A < 0 and mean(behaviour - current) above are dropped; 0: off
    )
    top_entropy: float = 0.0  # q: only the tokens of the q highest entropies carry the policy term; 0: all

    def validate(self) -> None:
        _choose("grpo.correction.name", self.name, CORRECTION_NAMES)
        for name in ("least", "most", "off_policy_threshold"):
            _at_least(f"grpo.correction.{name}", getattr(self, name), 0)
        if self.most <= self.least:
            raise ValueError(f"grpo.correction.most={self.most} must exceed least={self.least}")
        if not 0 <= self.top_entropy < 1:
            raise ValueError(
                f"grpo.correction.top_entropy={self.top_entropy} must lie in [0, 1); 0: all tokens"
            )


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are drawn."""

    max_prompt_tokens: int = 64  # P; longer prompts are passed over and counted
    max_new_tokens: int = 64  # N
    min_new_tokens: int = 0  # EOS cannot be drawn before
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    unroll_layers: bool = True  # lay scanned layers out meanwhile: faster, for a second copy of the weights
    gather_weights: bool = False  # hold the weights whole over the fsdp axis, not gathered for each token

    def validate(self) -> None:
        for name in ("max_prompt_tokens", "max_new_tokens"):
            _at_least(f"grpo.rollout.{name}", getattr(self, name), 1)
        for name in ("min_new_tokens", "top_k"):
            _at_least(f"grpo.rollout.{name}", getattr(self, name), 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"grpo.rollout.min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"grpo.rollout.temperature={self.temperature} must be positive: greedy rows are all alike"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"grpo.rollout.top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"grpo.rollout.min_p={self.min_p} must lie in [0, 1)")
        if self.top_k or self.top_p < 1 or self.min_p:
            warnings.warn(
                f"training on completions filtered by top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p} "
                "biases the policy gradient, whose log-probabilities are of the whole vocabulary",
                RLWarning,
                stacklevel=2,
            )


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """Harder problems when the easier ones are solved; levels are the problem's own."""

    level: int = (
        0  # where it starts, and where it stays unless enabled; 0: the problems' own, or 1 if enabled
    )
    enabled: bool = False
    decay: float = 0.9  # of the running mean of success
    up: float = 0.8
    down: float = 0.2
    easier: float = 0.2  # fraction of problems from lower levels

    def validate(self) -> None:
        _at_least("grpo.curriculum.level", self.level, 0)
        for name in ("decay", "up", "down", "easier"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"grpo.curriculum.{name}={getattr(self, name)} must lie in [0, 1]")
        if self.down >= self.up:
            raise ValueError(f"grpo.curriculum.down={self.down} must be below up={self.up}")


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Everything GRPO adds to training; data.batch_size is Q, the prompts of a step."""

    problems: str = (
        "problems:countdown"  # or "jsonl:FILE", "tfds:gsm8k", "hf:REPO:SPLIT"; see attnlab.data.problems
    )
    rewards: str = "exact"  # "exact + 0.1*well_formed + my.module:function"; see attnlab.rl.rewards
    template: str = "{question}"  # the prompt, made of a problem's question
    group_size: int = 8  # G
    iterations: int = 1  # mu, passes over each rollout
    minibatches: int = 1  # optimiser steps of each pass, each of whole groups
    aggregation: str = "seq_mean_token_mean"
    loss_length: int = 0  # C of "seq_sum_const"; 0: rollout.max_new_tokens
    count_empty_rows: bool = False  # rows without a scored token count in the mean over rows
    mask_truncated: bool = False  # completions without EOS are not learnt from (overlong filtering)
    overlong_cache: int = 0  # Lc of the soft overlong penalty within rollout.max_new_tokens; 0: off
    dynamic_sampling: bool = False  # draw until all Q groups have rewards that differ
    max_gen_batches: int = 4  # batches of prompts at most, with dynamic_sampling
    log_completions: int = 4  # groups of each logged step written to completions.jsonl
    advantage: AdvantageConfig = AdvantageConfig()
    weights: SequenceWeightConfig = SequenceWeightConfig()
    policy_loss: PolicyLossConfig = PolicyLossConfig()
    kl: KLConfig = KLConfig()
    entropy_bonus: EntropyBonusConfig = EntropyBonusConfig()
    correction: CorrectionConfig = CorrectionConfig()
    rollout: RolloutConfig = RolloutConfig()
    curriculum: CurriculumConfig = CurriculumConfig()

    @property
    def updates(self) -> int:
        """Optimiser steps on each rollout."""
        return self.iterations * self.minibatches

    def validate(self) -> None:
        """Raise ValueError with the offending values; warn of combinations that defeat themselves."""
        _choose("grpo.aggregation", self.aggregation, AGGREGATION_NAMES)
        _at_least("grpo.group_size", self.group_size, 2)
        for name in ("iterations", "minibatches", "max_gen_batches"):
            _at_least(f"grpo.{name}", getattr(self, name), 1)
        for name in ("loss_length", "overlong_cache", "log_completions"):
            _at_least(f"grpo.{name}", getattr(self, name), 0)
        parts = (self.advantage, self.weights, self.policy_loss, self.kl, self.entropy_bonus, self.correction)
        for part in (*parts, self.rollout, self.curriculum):
            part.validate()
        if self.overlong_cache >= self.rollout.max_new_tokens:
            raise ValueError(
                f"grpo.overlong_cache={self.overlong_cache} must be below rollout.max_new_tokens="
                f"{self.rollout.max_new_tokens}"
            )
        self._refuse_idle_options()
        self._warn()

    def _refuse_idle_options(self) -> None:
        """ValueError for options that would change nothing."""
        idle = {
            "loss_length": self.loss_length and self.aggregation != "seq_sum_const",
            "count_empty_rows": self.count_empty_rows and self.aggregation == "token_mean",
            "overlong_cache": self.overlong_cache and "length_penalty" not in self.rewards,
            "weights.weight_kl": self.weights.weight_kl
            and not (self.weights.name == "egsw" and self.kl.beta),
            "entropy_bonus.adaptive": self.entropy_bonus.adaptive and not self.entropy_bonus.delta,
        }
        reasons = {
            "loss_length": f"aggregation={self.aggregation!r} does not divide by it; use 'seq_sum_const'",
            "count_empty_rows": "aggregation='token_mean' does not count rows",
            "overlong_cache": f"rewards={self.rewards!r} have no length_penalty",
            "weights.weight_kl": "it needs weights.name='egsw' and kl.beta above 0",
            "entropy_bonus.adaptive": "it needs entropy_bonus.delta above 0",
        }
        for name in (name for name, useless in idle.items() if useless):
            raise ValueError(f"grpo.{name} has no effect: {reasons[name]}")

    def _warn(self) -> None:
        if self.policy_loss.name == "reinforce" and self.updates > 1:
            warnings.warn(
                f"policy_loss 'reinforce' does not correct for the {self.updates} updates on each rollout; use 'clip'",
                RLWarning,
                stacklevel=3,
            )
        per_token = self.aggregation in ("token_mean", "seq_mean_token_sum", "seq_sum_const")
        if self.policy_loss.name == "gspo" and per_token:
            warnings.warn(
                f"policy_loss 'gspo' with aggregation {self.aggregation!r} weights sequences by their length and loses "
                "GSPO's per-sequence objective; use 'seq_mean_token_mean'",
                RLWarning,
                stacklevel=3,
            )
