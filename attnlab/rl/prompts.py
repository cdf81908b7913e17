"""Numbered problems as prompts of one length.

Letters: R prompts, P prompt length (left-padded).
"""

from collections.abc import Iterable

import numpy as np

from attnlab.data.problems import Problem, ProblemSource
from attnlab.data.tokenizers import Tokenizer
from attnlab.models.decoding import left_pad

MOST_TOO_LONG = 1000  # prompts in a row


class Prompter:
    """Problems as prompts of at most `length` tokens; longer ones give way to the next of their row."""

    def __init__(self, source: ProblemSource, tokenizer: Tokenizer, template: str, length: int, stride: int):
        """template: the prompt, with {question} for the problem's; stride: between the problems of one row."""
        if "{question}" not in template:
            raise ValueError(f"grpo.template={template!r} must hold {{question}}, where the problem's is put")
        self.source, self.tokenizer, self.template = source, tokenizer, template
        self.length, self.stride = length, stride
        self.too_long = 0  # prompts passed over so far

    def encode(self, problem: Problem) -> np.ndarray:
        """BOS and the prompt's tokens, int32."""
        text = self.template.replace("{question}", problem.question)
        return np.concatenate([[self.tokenizer.bos_id], self.tokenizer.encode(text)]).astype(np.int32)

    def prompt(self, number: int, level: int, easier: float) -> tuple[Problem, np.ndarray]:
        """The problem of this number, or the first after it, `stride` apart, whose prompt fits; never a cut one."""
        for attempt in range(MOST_TOO_LONG):
            problem = self.source.problem(number + attempt * self.stride, level, easier)
            tokens = self.encode(problem)
            if len(tokens) <= self.length:
                return problem, tokens
            self.too_long += 1
        raise ValueError(
            f"{MOST_TOO_LONG} prompts in a row are longer than grpo.rollout.max_prompt_tokens={self.length} (the last "
            f"has {len(tokens)} tokens); raise it, or choose shorter problems"
        )

    def batch(
        self, numbers: Iterable[int], level: int, easier: float
    ) -> tuple[list[Problem], np.ndarray, np.ndarray]:
        """(problems, prompts int32 [R, P], starts int32 [R], the pads of each)."""
        drawn = [self.prompt(int(number), level, easier) for number in numbers]
        problems, tokens = zip(*drawn, strict=True)
        return list(problems), *left_pad(tokens, self.tokenizer.pad_id, self.length)
