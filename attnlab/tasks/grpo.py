"""GRPO with verifiable rewards: a step explores with the policy, then updates it on what was found.

Letters: Q prompts (data.batch_size), G completions of each (a group), mu passes over a rollout, M minibatches of each.
`training.steps` counts rollouts; each makes mu M updates, and the learning rate follows the rollouts.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.config import Experiment
from attnlab.data.problems import curriculum, open_problems
from attnlab.data.tokenizers import Tokenizer, open_tokenizer
from attnlab.evaluation import Context, run, write
from attnlab.objectives.grpo import GRPO, Batch, finish_batch
from attnlab.objectives.language_modelling import LanguageModelling
from attnlab.rl.config import GRPOConfig, RLWarning
from attnlab.rl.experience import make_experience
from attnlab.rl.prompts import Prompter
from attnlab.rl.rewards import check_rewards, parse_rewards
from attnlab.rl.rollout import completion_texts
from attnlab.rl.surrogate import applied_coefficient, next_coefficient
from attnlab.tasks.completions_file import CompletionsFile
from attnlab.tasks.exploration import ROWS, Explored, Explorer, Log
from attnlab.tasks.streams import fill_streams
from attnlab.tasks.warm_start import WarmStart
from attnlab.training import multihost
from attnlab.training.feed import Feed
from attnlab.training.task import Done, Updates

SHUFFLE_STREAM = 2  # of training.seed; rollouts have another
NEARLY_ALL = (
    0.95  # fraction of completions cut off, or of groups without differences, that is worth a warning
)
Memory = dict[str, Any]


@dataclasses.dataclass
class GRPOTask(WarmStart):
    """Group relative policy optimisation on problems whose answers can be checked."""

    experiment: Experiment
    tokenizer: Tokenizer
    objective: GRPO
    language_modelling: LanguageModelling  # what evaluators measure the policy with
    explorer: Explorer
    completions: CompletionsFile | None = None  # once there is a folder
    warned: set[str] = dataclasses.field(default_factory=set)
    jitted: Callable | None = None

    cursor_width = 1  # problems drawn
    shown = ("reward", "entropy")
    evaluators = ("problems",)

    @classmethod
    def open(cls, experiment: Experiment) -> GRPOTask:
        options = experiment.grpo
        tokenizer = open_tokenizer(experiment.data.tokenizer)
        model = fill_streams(experiment.model.with_vocab(tokenizer.vocab_size), experiment.data, tokenizer)
        experiment = dataclasses.replace(experiment, model=model)
        objective = GRPO(model, options, experiment.language_modelling.implementation)
        data, rollout = experiment.data, options.rollout
        source = open_problems(
            options.problems,
            "train",
            data.data_dir,
            seed=data.seed,
            leader=multihost.is_main(),
            barrier=functools.partial(multihost.barrier, "problems"),
        )
        prompter = Prompter(source, tokenizer, options.template, rollout.max_prompt_tokens, data.batch_size)
        rewards = parse_rewards(options.rewards)
        check_rewards(rewards, source.scores, options.overlong_cache)
        explorer = Explorer(options, objective.module, prompter, rewards, experiment.training.seed)
        as_text = LanguageModelling(model, experiment.language_modelling, data.sequence_length)
        return cls(experiment, tokenizer, objective, as_text, explorer)

    @property
    def batch_size(self) -> int:
        return self.experiment.data.batch_size

    @property
    def updates_per_step(self) -> int:
        return self.experiment.grpo.updates

    def prepare(self, workdir: Path) -> None:
        """Completions are logged to `workdir`."""
        self.completions = CompletionsFile(workdir)

    def batches(self, rows: Sequence[int], cursor: np.ndarray | None) -> Iterator:
        """Numbers of problems int64 [R]: row r takes r, r + Q, r + 2Q, .. in every division among processes."""
        cursor = np.zeros((len(rows), 1), np.int32) if cursor is None else np.array(cursor, np.int32)
        while True:
            number = cursor[:, 0].astype(np.int64) * self.batch_size + np.array(rows)
            cursor = cursor + 1
            yield {"number": number}, cursor

    def init_memory(self, params: Any) -> Memory:
        """The reference policy, the adaptive entropy coefficient, the curriculum: whatever the options need."""
        options, memory = self.experiment.grpo, {}
        if options.kl.beta:
            memory["reference"] = jax.tree.map(jnp.copy, params)
        if options.entropy_bonus.adaptive:
            memory["coefficient"] = jnp.float32(options.entropy_bonus.coefficient)
            memory["last_entropy"] = jnp.float32(0)  # none was seen: the bonus applies
        if options.curriculum.enabled:
            middle = curriculum.start(options.curriculum.up, options.curriculum.down)
            memory |= {"level": jnp.float32(max(options.curriculum.level, 1)), "success": jnp.float32(middle)}
        return memory

    def updates(self, params: Any, memory: Memory, feed: Feed, step: int) -> Updates:
        level = int(memory.get("level", self.experiment.grpo.curriculum.level))
        explored, log = self.explorer.explore(params, feed, step, level)
        batch, metrics = self._experience(feed)(
            params, memory.get("reference"), *explored, self._reward_weights()
        )
        metrics = self._named(jax.device_get(metrics))
        self._warn(metrics)
        if self._is_logged(step):
            self._log_completions(step, feed, explored, batch)
        began = time.monotonic()
        memory = dict(memory)
        complete = _jit_finish(self.experiment.grpo, NamedSharding(feed.mesh, ROWS))
        for part in self._minibatches(batch, feed, step):
            updated = yield complete(part, self._coefficient(memory))
            self._remember_entropy(memory, updated.scalars)
        jax.block_until_ready(updated.scalars)  # so that the time is the updates' own
        metrics |= self._host_metrics(log, level, memory, time.monotonic() - began)
        self._learn_level(memory, metrics)
        self._sync_reference(memory, updated.params, step)
        return Done(memory, int(log.tokens), metrics, waited=True)

    # --- one rollout's experience ------------------------------------------------------------------------

    def _experience(self, feed: Feed):
        """`make_experience` compiled for this mesh, once."""
        if self.jitted is None:
            objective = self.objective

            def experience(*given):
                made = (objective.options, objective.module, *given)
                return make_experience(*made, implementation=objective.implementation or None)

            places = NamedSharding(feed.mesh, ROWS), NamedSharding(feed.mesh, PartitionSpec())
            self.jitted = jax.jit(experience, out_shardings=places)
        return self.jitted

    def _reward_weights(self) -> np.ndarray:
        return np.array([reward.weight for reward in self.explorer.rewards], np.float32)

    def _minibatches(self, batch: Batch, feed: Feed, step: int) -> Iterator[Batch]:
        """Whole groups, dealt anew for each pass; the whole batch where there is one update."""
        options, Q = self.experiment.grpo, self.batch_size
        rng = np.random.default_rng([self.experiment.training.seed, SHUFFLE_STREAM, step])
        for _ in range(options.iterations):
            if options.minibatches == 1:
                yield batch
                continue
            for order in rng.permutation(Q).astype(np.int32).reshape(options.minibatches, -1):
                yield _jit_take(NamedSharding(feed.mesh, ROWS))(batch, order)

    # --- what is kept from step to step --------------------------------------------------------------------

    def _coefficient(self, memory: Memory) -> jax.Array:
        bonus = self.experiment.grpo.entropy_bonus
        if not bonus.adaptive:
            return jnp.float32(bonus.coefficient)
        return applied_coefficient(bonus, memory["coefficient"], memory["last_entropy"])

    def _remember_entropy(self, memory: Memory, scalars: dict[str, jax.Array]) -> None:
        bonus = self.experiment.grpo.entropy_bonus
        if bonus.adaptive:
            entropy = scalars["entropy"]
            memory["coefficient"] = next_coefficient(bonus, memory["coefficient"], entropy)
            memory["last_entropy"] = entropy

    def _learn_level(self, memory: Memory, metrics: dict[str, float]) -> None:
        """The curriculum's next level; success is the mean of the first reward."""
        options = self.experiment.grpo.curriculum
        if not options.enabled:
            return
        success = metrics[f"rewards/{self.explorer.rewards[0].name}/mean"]
        level, mean = curriculum.advance(
            int(memory["level"]),
            float(memory["success"]),
            success,
            num_levels=self.explorer.prompter.source.num_levels,
            decay=options.decay,
            up=options.up,
            down=options.down,
        )
        place = memory["level"].sharding
        memory["level"] = jax.device_put(jnp.float32(level), place)
        memory["success"] = jax.device_put(jnp.float32(mean), place)

    def _sync_reference(self, memory: Memory, params: Any, step: int) -> None:
        kl = self.experiment.grpo.kl
        if kl.sync_steps and (step + 1) % kl.sync_steps == 0:
            memory["reference"] = _mix(memory["reference"], params, kl.sync_mix)

    # --- what is told --------------------------------------------------------------------------------------

    def _named(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Rewards by the names of their functions instead of their numbers."""
        names = [reward.name for reward in self.explorer.rewards]
        renamed = {}
        for key, value in metrics.items():
            group, _, rest = key.partition("/")
            if group == "rewards":
                number, _, rest = rest.partition("/")
                key = f"rewards/{names[int(number)]}/{rest}"
            renamed[key] = float(value)
        return renamed

    def _host_metrics(self, log: Log, level: int, memory: Memory, update_seconds: float) -> dict[str, float]:
        metrics = {f"time/{name}": seconds for name, seconds in log.seconds.items()}
        metrics |= {"time/update": update_seconds, "gen_batches_per_step": float(log.batches)}
        metrics |= {f"rewards/{name}/errors": float(count) for name, count in log.errors.items()}
        if log.too_long:
            metrics["prompts/too_long"] = float(log.too_long)
        if self.experiment.grpo.curriculum.enabled:
            metrics["curriculum/level"] = float(level)
        if "coefficient" in memory:
            metrics["entropy_coefficient"] = float(memory["coefficient"])
        return metrics

    def _warn(self, metrics: dict[str, float]) -> None:
        """Once a run for each thing that leaves next to nothing to learn from."""
        reasons = {
            "completions/clipped_ratio": "of the completions are cut off before their end; raise "
            "grpo.rollout.max_new_tokens",
            "frac_reward_zero_std": "of the groups have rewards all alike, which teach nothing; choose easier or "
            "harder problems, more completions, or grpo.dynamic_sampling",
        }
        for name, reason in reasons.items():
            if metrics[name] > NEARLY_ALL and name not in self.warned and multihost.is_main():
                self.warned.add(name)
                warnings.warn(f"{100 * metrics[name]:.0f} % {reason}", RLWarning, stacklevel=2)

    def _is_logged(self, step: int) -> bool:
        training = self.experiment.training
        return self.completions is not None and (
            (step + 1) % training.log_every == 0 or step + 1 == training.steps
        )

    def _log_completions(self, step: int, feed: Feed, explored: Explored, batch: Batch) -> None:
        """The first groups of process 0, as texts again."""
        groups = self.experiment.grpo.log_completions
        if not groups or not multihost.is_main():
            return
        shown = {name: batch[name] for name in ("advantages", "weights", "entropy") if name in batch}
        rows = shown | {"rewards": explored.rewards, "lengths": explored.rollout.lengths}
        local = feed.local((explored.prompts, explored.starts, explored.rollout, rows))
        prompts, starts, rollout, rows = jax.tree.map(lambda x: x[:groups], local)
        texts = completion_texts(self.tokenizer, prompts, starts, rollout)
        prompts = [self.tokenizer.decode(row[start:]) for row, start in zip(prompts, starts, strict=True)]
        names = [reward.name for reward in self.explorer.rewards]
        self.completions.write(step + 1, names, prompts, texts, rows)

    # --- measurements --------------------------------------------------------------------------------------

    def context(
        self, params: Any, mesh: jax.sharding.Mesh, step: int | None = None, split: str = ""
    ) -> Context:
        """For evaluators, which see a policy as the language model that it is."""
        return Context(self.experiment, self.language_modelling, params, mesh, self.tokenizer, step, split)

    def evaluate(self, params: Any, mesh: jax.sharding.Mesh) -> dict[str, float]:
        return run("problems", self.context(params, mesh)).scalars

    def finish(self, params: Any, mesh: jax.sharding.Mesh, workdir: Path) -> list[Path]:
        result = run("problems", self.context(params, mesh, self.experiment.training.steps))
        return write(result, workdir / "eval")


@functools.cache
def _jit_finish(options: GRPOConfig, sharding: NamedSharding):
    return jax.jit(functools.partial(finish_batch, options), out_shardings=sharding)


@functools.cache
def _jit_take(sharding: NamedSharding):
    return jax.jit(lambda batch, order: jax.tree.map(lambda x: x[order], batch), out_shardings=sharding)


@functools.partial(jax.jit, static_argnums=2)
def _mix(reference: Any, params: Any, share: float) -> Any:
    """reference <- share * policy + (1 - share) * reference (TR-DPO)."""
    return jax.tree.map(lambda old, new: share * new + (1 - share) * old, reference, params)
