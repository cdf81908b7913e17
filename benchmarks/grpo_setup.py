"""What both sides of the GRPO benchmark are given: sizes, a tokeniser's file, prompts, a reward.

Letters: Q prompts, G completions of each, P tokens of a prompt, N new tokens of a completion. Every prompt has exactly
P tokens and every completion exactly N, so that both sides draw and learn from the same number of tokens.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

TOKENIZER, PROBLEMS = "tokenizer.json", "problems.jsonl"
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL = (PAD, BOS, EOS)
THETA, EPSILON, LEARNING_RATE = 10_000.0, 1e-6, 1e-4
WEIGHT_DECAY, BETAS, ADAM_EPSILON, CLIP_NORM = 0.01, (0.9, 0.999), 1e-8, 1.0


@dataclasses.dataclass(frozen=True)
class Size:
    """The batch and the decoder, with the names of the command line's options."""

    prompts: int = 32  # Q
    group: int = 8  # G
    prompt_tokens: int = 8  # P, BOS included
    new_tokens: int = 8  # N
    layers: int = 2
    hidden_size: int = 64
    heads: int = 4
    mlp_size: int = 0  # 0: 8/3 of hidden_size, rounded up to a multiple of 16
    vocabulary: int = 512

    @property
    def inner_size(self) -> int:
        return self.mlp_size or 16 * -(-8 * self.hidden_size // 48)

    @property
    def drawn(self) -> int:
        """Tokens drawn in a rollout."""
        return self.prompts * self.group * self.new_tokens

    @property
    def read(self) -> int:
        """Tokens read by an update: of every completion and of the prompt before it."""
        return self.prompts * self.group * (self.prompt_tokens + self.new_tokens)

    def validate(self) -> None:
        least = {"group": 2, "prompt_tokens": 2, "vocabulary": len(SPECIAL) + 2, "mlp_size": 0}
        for field in dataclasses.fields(self):
            value, needed = getattr(self, field.name), least.get(field.name, 1)
            if value < needed:
                raise ValueError(f"--{field.name}={value} must be at least {needed}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"--hidden_size={self.hidden_size} must be a multiple of twice --heads={self.heads}"
            )


class Seconds(NamedTuple):
    """Of one step; step includes what is neither rollout nor update: prompts, texts, rewards, advantages."""

    rollout: float
    update: float
    step: float


def write_files(size: Size, folder: Path, seed: int = 0) -> list[str]:
    """Write TOKENIZER and PROBLEMS into `folder`; returns the prompts' texts, BOS not written out."""
    words = [f"w{number}" for number in range(size.vocabulary - len(SPECIAL))]
    pieces = {piece: number for number, piece in enumerate((*SPECIAL, *words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token=PAD))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, pieces[BOS])]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / TOKENIZER))
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(words, size.prompt_tokens - 1)) for _ in range(size.prompts)]
    rows = (json.dumps({"prompt": text, "answer": words[0]}) + "\n" for text in texts)
    (folder / PROBLEMS).write_text("".join(rows))
    return texts


def even(ids, **_) -> list[float]:
    """The reward: the fraction of a completion's token ids that are even."""
    return [sum(token % 2 == 0 for token in row) / max(len(row), 1) for row in ids]
