"""The host's half of a rollout: problems become prompts, completions become texts, texts become rewards.

Letters: Q prompts, G completions of each, P prompt length, N completion length, K reward functions; R of the Q prompts
belong to this process. Every process draws its own rows, completes them with all others, and scores its own.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.models.language_model import LanguageModel
from attnlab.models.placement import BATCH_AXES
from attnlab.rl.completions import keep_groups
from attnlab.rl.config import GRPOConfig
from attnlab.rl.prompts import Prompter
from attnlab.rl.rewards import Reward
from attnlab.rl.rollout import Rollout, roll_out
from attnlab.rl.scoring import score_rollout
from attnlab.training.feed import Feed
from attnlab.training.sharding import RULES, tree_shardings

ROWS = P(BATCH_AXES)  # whole groups to a device, everything else of them together


class Explored(NamedTuple):
    """Q prompts with their completions and rewards, on the mesh.

    prompts int32 [Q, P]; starts int32 [Q]; rollout leaves [Q, G, ..]; rewards float32 [Q, G, K], NaN where one does not
    apply; groups bool [Q], False where there was no group to fill the place.
    """

    prompts: jax.Array
    starts: jax.Array
    rollout: Rollout
    rewards: jax.Array
    groups: jax.Array


@dataclasses.dataclass
class Log:
    """What happened on the host meanwhile."""

    batches: int = 0
    tokens: Any = 0  # of prompts and completions, over all processes
    too_long: int = 0  # prompts passed over
    errors: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"rollout": 0.0, "reward": 0.0})


class Explorer:
    """Draws, completes and scores batches of problems."""

    def __init__(
        self,
        config: GRPOConfig,
        model: LanguageModel,
        prompter: Prompter,
        rewards: Sequence[Reward],
        seed: int,
    ):
        self.config, self.model, self.prompter, self.rewards = config, model, prompter, tuple(rewards)
        self.tokenizer = prompter.tokenizer
        self.jitted = None
        self.key = jax.random.fold_in(jax.random.key(seed), ROLLOUT_STREAM)

    def explore(self, params: Any, feed: Feed, step: int, level: int) -> tuple[Explored, Log]:
        """One batch, or with dynamic sampling the informative groups of as many as it takes."""
        log = Log()
        if not self.config.dynamic_sampling:
            return self._batch(params, feed, step, level, log), log
        return self._informative(params, feed, step, level, log), log

    def _informative(self, params, feed: Feed, step: int, level: int, log: Log) -> Explored:
        """The first Q groups whose rewards differ; what is missing after max_gen_batches stays empty."""
        found: list[Explored] = []
        keep = np.zeros(0, bool)
        while log.batches < self.config.max_gen_batches and keep.sum() < feed.batch_size:
            found.append(self._batch(params, feed, step, level, log))
            keep = np.concatenate([keep, np.asarray(_worth_keeping(self._weights(), found[-1]))])
        order = np.argsort(~keep, kind="stable")[: feed.batch_size].astype(np.int32)
        return _jit_chosen(NamedSharding(feed.mesh, ROWS))(found, order, keep[order])

    def _weights(self) -> jax.Array:
        return jnp.array([reward.weight for reward in self.rewards], jnp.float32)

    def _batch(self, params, feed: Feed, step: int, level: int, log: Log) -> Explored:
        problems, prompts, starts = self._prompts(feed.draw()["number"], level, log)
        began = time.monotonic()
        placed = feed.place((prompts, starts), ROWS)
        key = jax.random.fold_in(jax.random.fold_in(self.key, step), log.batches)
        rollout = self._roll_out(feed)(params, *placed, key, np.arange(feed.batch_size, dtype=np.int32))
        local = Rollout(*feed.local(rollout))
        log.seconds["rollout"] += time.monotonic() - began
        log.tokens = log.tokens + _tokens(prompts.shape[1], placed[1], rollout.lengths)
        began = time.monotonic()
        rewards = self._score(problems, prompts, starts, local, log)
        log.seconds["reward"] += time.monotonic() - began
        log.batches += 1
        groups = feed.place(np.ones(len(problems), bool), ROWS)
        return Explored(*placed, rollout, feed.place(rewards, ROWS), groups)

    def _prompts(self, numbers: np.ndarray, level: int, log: Log):
        """(problems, prompts int32 [R, P], starts int32 [R]) of these numbers."""
        before = self.prompter.too_long
        easier = self.config.curriculum.easier if self.config.curriculum.enabled else 0.0
        drawn = self.prompter.batch(numbers, level, easier)
        log.too_long += self.prompter.too_long - before
        return drawn

    def _roll_out(self, feed: Feed):
        """`roll_out` compiled for this mesh, once."""
        if self.jitted is None:
            tokenizer, options = self.tokenizer, self.config
            special = {"stop_ids": (tokenizer.eos_id,), "pad_id": tokenizer.pad_id}
            special |= {"vocab_size": tokenizer.vocab_size, "forbidden_ids": (tokenizer.bos_id,)}

            def run(params, *given):
                params = gathered(params, feed.mesh) if options.rollout.gather_weights else params
                return roll_out(self.model, params, *given, options.rollout, options.group_size, **special)

            self.jitted = jax.jit(run, out_shardings=NamedSharding(feed.mesh, ROWS))
        return self.jitted

    def _score(self, problems, prompts, starts, local: Rollout, log: Log) -> np.ndarray:
        """Rewards float32 [R, G, K] of this process's rows."""
        given = (problems, self.tokenizer, prompts, starts, local, self.config.overlong_cache)
        rewards, _, errors = score_rollout(self.rewards, *given)
        for name, count in errors.items():
            log.errors[name] = log.errors.get(name, 0) + count
        return rewards


def gathered(params: Any, mesh: Mesh) -> Any:
    """Parameters laid out as in training but whole over the fsdp axis: gathered once a rollout, not once a token."""
    rules = [(pattern, tuple(None if axis == "fsdp" else axis for axis in axes)) for pattern, axes in RULES]
    return jax.lax.with_sharding_constraint(params, tree_shardings(params, mesh, rules))


ROLLOUT_STREAM = 1  # of the seed; the order of minibatches has another


@functools.partial(jax.jit, static_argnums=0)
def _tokens(length: int, starts: jax.Array, lengths: jax.Array) -> jax.Array:
    """Tokens of all rows [Q, G], their prompts included."""
    return ((length - starts)[:, None] + lengths).sum()


@jax.jit
def _worth_keeping(weights: jax.Array, explored: Explored) -> jax.Array:
    """bool [Q], whole on every device: groups whose summed rewards differ."""
    present = ~jnp.isnan(explored.rewards)
    reward = jnp.where(present, explored.rewards * weights, 0).sum(-1)
    keep = keep_groups(jnp.where(present.any(-1), reward, jnp.nan))
    mesh = jax.sharding.get_abstract_mesh()
    return keep if mesh.empty else jax.lax.with_sharding_constraint(keep, P())


@functools.cache
def _jit_chosen(sharding: NamedSharding):
    """(batches, order [Q], keep [Q]) -> the groups `order` of all of them; those not kept count as empty."""

    def choose(found: list[Explored], order: jax.Array, keep: jax.Array) -> Explored:
        chosen = jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *found)
        return chosen._replace(groups=chosen.groups & keep)

    return jax.jit(choose, out_shardings=sharding)
