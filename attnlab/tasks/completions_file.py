"""A run's sampled completions as JSON lines, to be read by people: <workdir>/completions.jsonl.

One line a completion: step, prompt, text, length in tokens, rewards by name, advantage, and, where they are known,
the mean entropy H_i and the weight w_i. A resumed run drops what an earlier one wrote after the step it resumes from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from attnlab.training.files import write_atomically

COMPLETIONS = "completions.jsonl"


class CompletionsFile:
    """Appends groups; only process 0 should write."""

    def __init__(self, workdir: Path):
        self.path = workdir / COMPLETIONS
        self._rewound = False

    def write(
        self,
        step: int,
        reward_names: Sequence[str],
        prompts: Sequence[str],
        texts: Sequence[Sequence[str]],
        rows: Mapping[str, np.ndarray],
    ) -> None:
        """Groups of completions; `rows` has rewards [R, G, K], lengths and advantages [R, G], and perhaps more."""
        if not self._rewound:
            self._rewind(step)
        lines = []
        for row, (prompt, group) in enumerate(zip(prompts, texts, strict=True)):
            for g, text in enumerate(group):
                entry = {"step": step, "prompt": prompt, "text": text}
                lines.append(json.dumps(entry | _numbers(reward_names, rows, row, g)) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def _rewind(self, step: int) -> None:
        """Keep what was written before this step; a line cut off by a kill is dropped with it."""
        self._rewound = True
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        write_atomically(self.path, "".join(kept))


def _numbers(reward_names: Sequence[str], rows: Mapping[str, np.ndarray], row: int, g: int) -> dict:
    """Of one completion; what a token has of its own is given as the mean over tokens."""
    values = zip(reward_names, rows["rewards"][row, g].tolist(), strict=True)
    rewards = {name: value if math.isfinite(value) else None for name, value in values}
    found = {"tokens": int(rows["lengths"][row, g]), "rewards": rewards}
    for name in ("advantages", "entropy", "weights"):
        if name in rows:
            found[name.rstrip("s") if name != "entropy" else name] = float(np.mean(rows[name][row, g]))
    return found
