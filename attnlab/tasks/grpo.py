"""GRPO with verifiable rewards: a step explores with the policy, then updates it on what was found.

Letters: Q prompts (data.batch_size), G completions of each (a group), mu passes over a rollout, M minibatches of each.
`training.steps` counts rollouts; each makes mu M updates, and the learning rate follows the rollouts.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.config import Experiment
from attnlab.data.problems import open_problems
from attnlab.data.tokenizers import Tokenizer, open_tokenizer
from attnlab.evaluation import Context, Result, run, write
from attnlab.objectives.grpo import GRPO, Batch, finish_batch
from attnlab.objectives.language_modelling import LanguageModelling
from attnlab.rl.config import GRPOConfig
from attnlab.rl.experience import make_experience
from attnlab.rl.memory import Memory, after_step, after_update, coefficient_of, init_memory, level_of
from attnlab.rl.prompts import Prompter
from attnlab.rl.rewards import check_rewards, parse_rewards
from attnlab.tasks.exploration import ROWS, Explorer
from attnlab.tasks.grpo_report import Report
from attnlab.tasks.streams import fill_streams
from attnlab.tasks.warm_start import WarmStart
from attnlab.training import multihost
from attnlab.training.feed import Feed
from attnlab.training.task import Done, Updates

SHUFFLE_STREAM = 2  # of training.seed; rollouts have another


@dataclasses.dataclass
class GRPOTask(WarmStart):
    """Group relative policy optimisation on problems whose answers can be checked."""

    experiment: Experiment
    tokenizer: Tokenizer
    objective: GRPO
    language_modelling: LanguageModelling  # what evaluators measure the policy with
    explorer: Explorer
    report: Report
    jitted: Callable | None = None
    measured: Result | None = None  # the newest evaluation

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
        report = Report([reward.name for reward in rewards], tokenizer, options.log_completions)
        return cls(experiment, tokenizer, objective, as_text, explorer, report)

    @property
    def batch_size(self) -> int:
        return self.experiment.data.batch_size

    @property
    def updates_per_step(self) -> int:
        return self.experiment.grpo.updates

    def prepare(self, workdir: Path) -> None:
        """Completions are logged to `workdir`."""
        self.report.open(workdir)

    def batches(self, rows: Sequence[int], cursor: np.ndarray | None) -> Iterator:
        """Numbers of problems int64 [R]: row r takes r, r + Q, r + 2Q, .. in every division among processes."""
        cursor = np.zeros((len(rows), 1), np.int32) if cursor is None else np.array(cursor, np.int32)
        while True:
            number = cursor[:, 0].astype(np.int64) * self.batch_size + np.array(rows)
            cursor = cursor + 1
            yield {"number": number}, cursor

    def init_memory(self, params: Any) -> Memory:
        return init_memory(self.experiment.grpo, params)

    def updates(self, params: Any, memory: Memory, feed: Feed, step: int) -> Updates:
        options, level = self.experiment.grpo, level_of(self.experiment.grpo, memory)
        explored, log = self.explorer.explore(params, feed, step, level)
        weights = np.array([reward.weight for reward in self.explorer.rewards], np.float32)
        batch, given = self._experience(feed)(params, memory.get("reference"), *explored, weights)
        metrics = self.report.metrics(given) | (
            {"curriculum/level": float(level)} if "level" in memory else {}
        )
        if self._is_logged(step):
            self.report.write_completions(step + 1, feed, explored, batch)
        began = time.monotonic()
        complete = _jit_finish(options, NamedSharding(feed.mesh, ROWS))
        for part in self._minibatches(batch, feed, step):
            updated = yield complete(part, coefficient_of(options, memory))
            memory = after_update(options, memory, updated.scalars["entropy"])
        jax.block_until_ready(updated.scalars)  # so that the time is the updates' own
        metrics |= self.report.of_host(log, time.monotonic() - began)
        metrics["num_tokens"] = feed.tokens + int(log.tokens)
        if "coefficient" in memory:
            metrics["entropy_coefficient"] = memory["coefficient"]
        success = metrics[f"rewards/{self.report.names[0]}/mean"]
        levels = self.explorer.prompter.source.num_levels
        memory = after_step(options, memory, updated.params, step, success, levels)
        return Done(memory, int(log.tokens), metrics, waited=True)

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

    def _is_logged(self, step: int) -> bool:
        training = self.experiment.training
        return (step + 1) % training.log_every == 0 or step + 1 == training.steps

    def context(
        self, params: Any, mesh: jax.sharding.Mesh, step: int | None = None, split: str = ""
    ) -> Context:
        """For evaluators, which see a policy as the language model that it is."""
        return Context(self.experiment, self.language_modelling, params, mesh, self.tokenizer, step, split)

    def evaluate(self, params: Any, mesh: jax.sharding.Mesh) -> dict[str, float]:
        self.measured = run("problems", self.context(params, mesh))
        return self.measured.scalars

    def finish(self, params: Any, mesh: jax.sharding.Mesh, workdir: Path) -> list[Path]:
        """The last evaluation in full; it is made again only where the run was killed after its last checkpoint."""
        result = self.measured or run("problems", self.context(params, mesh))
        about = result.about | {"step": self.experiment.training.steps}
        return write(dataclasses.replace(result, about=about), workdir / "eval")


@functools.cache
def _jit_finish(options: GRPOConfig, sharding: NamedSharding):
    return jax.jit(functools.partial(finish_batch, options), out_shardings=sharding)


@functools.cache
def _jit_take(sharding: NamedSharding):
    return jax.jit(lambda batch, order: jax.tree.map(lambda x: x[order], batch), out_shardings=sharding)
