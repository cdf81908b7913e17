"""From a rollout on the host to its rewards.

Letters: R prompts of this process, G completions of each, P prompt length, N completion length, K reward functions.
"""

from collections.abc import Sequence

import numpy as np

from attnlab.data.problems import Problem
from attnlab.data.tokenizers import Tokenizer
from attnlab.rl.rewards import Reward, score_all
from attnlab.rl.rollout import Rollout, completion_texts


def score_rollout(
    rewards: Sequence[Reward],
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    prompts: np.ndarray,
    starts: np.ndarray,
    rollout: Rollout,
    overlong_cache: int = 0,
) -> tuple[np.ndarray, list[list[str]], dict[str, int]]:
    """(rewards float32 [R, G, K] with NaN where one does not apply, texts of R groups, how often each function failed).

    prompts int32 [R, P], starts int32 [R] and the rollout's leaves [R, G, ..] are numpy arrays.
    """
    texts = completion_texts(tokenizer, prompts, starts, rollout)
    asked = [tokenizer.decode(row[start:]) for row, start in zip(prompts, starts, strict=True)]
    R, G, N = rollout.ids.shape
    lengths = rollout.lengths.reshape(-1)
    values, errors = score_all(
        rewards,
        [problem for problem in problems for _ in range(G)],
        [text for group in texts for text in group],
        [row[:length] for row, length in zip(rollout.ids.reshape(R * G, N), lengths, strict=True)],
        lengths,
        rollout.truncated.reshape(-1),
        N,
        overlong_cache,
        prompts=[prompt for prompt in asked for _ in range(G)],
    )
    return values.reshape(R, G, len(rewards)), texts, errors
