"""What a GRPO run tells: metrics by name, warnings, completions to read.

Letters: R prompts of this process, G completions of each, K reward functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from attnlab.data.tokenizers import Tokenizer
from attnlab.rl.config import RLWarning
from attnlab.rl.rollout import completion_texts
from attnlab.tasks.completions_file import CompletionsFile
from attnlab.tasks.exploration import Explored, Log
from attnlab.training import multihost
from attnlab.training.feed import Feed

NEARLY_ALL = (
    0.95  # fraction of completions cut off, or of groups without differences, that is worth a warning
)
LITTLE_TO_LEARN = {
    "completions/clipped_ratio": "of the completions are cut off before their end; raise grpo.rollout.max_new_tokens",
    "frac_reward_zero_std": "of the groups have rewards all alike, which teach nothing; choose easier or harder "
    "problems, more completions, or grpo.dynamic_sampling",
}


class Report:
    """Of one run, whose rewards are called `names`; process 0 writes and warns."""

    def __init__(self, names: Sequence[str], tokenizer: Tokenizer, groups: int):
        """groups: how many are written of each logged step."""
        self.names, self.tokenizer, self.groups = tuple(names), tokenizer, groups
        self.completions: CompletionsFile | None = None
        self._warned: set[str] = set()

    def open(self, workdir: Path) -> None:
        """From now on completions are written to `workdir`."""
        self.completions = CompletionsFile(workdir)

    def metrics(self, given: dict[str, Any]) -> dict[str, float]:
        """Scalars of an experience, with rewards by the names of their functions instead of their numbers."""
        renamed = {}
        for key, value in jax.device_get(given).items():
            group, _, rest = key.partition("/")
            if group == "rewards":
                number, _, rest = rest.partition("/")
                key = f"rewards/{self.names[int(number)]}/{rest}"
            renamed[key] = float(value)
        self._warn(renamed)
        return renamed

    def of_host(self, log: Log, update_seconds: float) -> dict[str, float]:
        """What happened outside the device."""
        metrics = {f"time/{name}": seconds for name, seconds in log.seconds.items()}
        metrics |= {"time/update": update_seconds, "gen_batches_per_step": float(log.batches)}
        metrics |= {f"rewards/{name}/errors": float(count) for name, count in log.errors.items()}
        return metrics | ({"prompts/too_long": float(log.too_long)} if log.too_long else {})

    def write_completions(
        self, step: int, feed: Feed, explored: Explored, batch: dict[str, jax.Array]
    ) -> None:
        """The first groups of process 0, as texts again."""
        if self.completions is None or not self.groups or not multihost.is_main():
            return
        shown = {name: batch[name] for name in ("advantages", "weights", "entropy") if name in batch}
        rows = shown | {"rewards": explored.rewards, "lengths": explored.rollout.lengths}
        local = feed.local((explored.prompts, explored.starts, explored.rollout, rows))
        prompts, starts, rollout, rows = jax.tree.map(lambda x: x[: self.groups], local)
        texts = completion_texts(self.tokenizer, prompts, starts, rollout)
        asked = [self.tokenizer.decode(row[start:]) for row, start in zip(prompts, starts, strict=True)]
        self.completions.write(step, self.names, asked, texts, rows)

    def _warn(self, metrics: dict[str, float]) -> None:
        """Once a run for each thing that leaves next to nothing to learn from."""
        for name, reason in LITTLE_TO_LEARN.items():
            if metrics[name] > NEARLY_ALL and name not in self._warned and multihost.is_main():
                self._warned.add(name)
                warnings.warn(f"{100 * metrics[name]:.0f} % {reason}", RLWarning, stacklevel=2)
