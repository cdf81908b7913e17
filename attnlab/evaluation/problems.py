"""How many held-out problems a policy solves: greedily, on average over samples, and in k tries.

    mean@n = c / n        pass@k = 1 - C(n - c, k) / C(n, k)        majority@k: the commonest of the first k answers

of n samples at the rollout's temperature, c of them right; pass@k is the unbiased estimate of at least one right in k
(arXiv 2107.03374). Right means that the first of grpo.rewards is 1. Standard errors are over problems.

Letters: Q problems of a batch, G = n samples of each, P prompt length, N completion length.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure

from attnlab.data.hosts import to_global
from attnlab.data.problems import Problem, open_problems
from attnlab.evaluation.config import EvalConfig
from attnlab.evaluation.evaluator import Context, Result
from attnlab.evaluation.scores import Static
from attnlab.models.placement import BATCH_AXES
from attnlab.rl.config import GRPOConfig, RolloutConfig
from attnlab.rl.prompts import Prompter
from attnlab.rl.rewards import parse_rewards
from attnlab.rl.rollout import Rollout, roll_out, score_tokens
from attnlab.rl.scoring import score_rollout

SPLIT = "test"
RIGHT = 1 - 1e-6
SEED = 0  # of the samples: the same at every evaluation of a run, so that curves are comparable


class Answers(NamedTuple):
    """Of problems: bool right [problems, G], texts, lengths in tokens and mean entropies [problems, G]."""

    right: np.ndarray
    texts: list[list[str]]
    lengths: np.ndarray
    entropy: np.ndarray


def run(context: Context, config: EvalConfig) -> Result:
    """Scalars accuracy (greedy), error, mean_at_n, pass_at_k, majority_at_k with errors, length, entropy.

    Rows: one a problem. The same on every process. ValueError if grpo.problems has no test split.
    """
    asked = _ask(context, config)
    greedy = _answer(context, asked, dataclasses.replace(_rollout(context), temperature=0.0), 1)
    sampled = _answer(context, asked, _rollout(context), config.problem_samples)
    rows = table(asked.problems, greedy, sampled)
    return Result(summarize(greedy, sampled, config.pass_at), rows, lambda: _figure(sampled))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Problems with their prompts int32 [n, P] and starts int32 [n]."""

    problems: list[Problem]
    prompts: np.ndarray
    starts: np.ndarray


def _options(context: Context) -> GRPOConfig:
    return context.experiment.grpo


def _rollout(context: Context) -> RolloutConfig:
    return dataclasses.replace(_options(context).rollout, top_k=0, top_p=1.0, min_p=0.0)


def _ask(context: Context, config: EvalConfig) -> _Asked:
    """The first `config.problems` problems of the test split, as many as there are if fewer."""
    options, data = _options(context), context.experiment.data
    source = open_problems(options.problems, context.split or SPLIT, data_dir=data.data_dir, seed=data.seed)
    count = min(config.problems, source.finite or config.problems)
    prompter = Prompter(source, context.tokenizer, options.template, options.rollout.max_prompt_tokens, count)
    return _Asked(*prompter.batch(range(count), config.problem_level, 0.0))


def _answer(context: Context, asked: _Asked, rollout: RolloutConfig, samples: int) -> Answers:
    """`samples` completions of every problem, scored."""
    rewards = parse_rewards(_options(context).rewards)[:1]
    found = []
    for first, prompts, starts in _batches(context, asked):
        drawn, entropy = _draw(context, rollout, samples, prompts, starts, first)
        count = min(len(prompts), len(asked.problems) - first)
        drawn = Rollout(*(leaf[:count] for leaf in drawn))
        problems = asked.problems[first : first + count]
        given = (problems, context.tokenizer, prompts[:count], starts[:count], drawn)
        values, texts, _ = score_rollout(rewards, *given, _options(context).overlong_cache)
        found.append(Answers(np.nan_to_num(values[..., 0]) > RIGHT, texts, drawn.lengths, entropy[:count]))
    right, texts, lengths, entropy = zip(*found, strict=True)
    texts = [group for part in texts for group in part]
    return Answers(np.concatenate(right), texts, np.concatenate(lengths), np.concatenate(entropy))


def _batches(context: Context, asked: _Asked) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number of the first, prompts [Q, P], starts [Q]) with Q = data.batch_size, the last filled up with the first."""
    Q = context.experiment.data.batch_size
    for first in range(0, len(asked.problems), Q):
        rows = np.arange(first, first + Q) % len(asked.problems)
        yield first, asked.prompts[rows], asked.starts[rows]


def _draw(
    context: Context, rollout: RolloutConfig, samples: int, prompts, starts, first: int
) -> tuple[Rollout, np.ndarray]:
    """Rollouts and mean entropies [Q, G] of a batch, whole on the host."""
    tokenizer, Q = context.tokenizer, len(prompts)
    sharding = NamedSharding(context.mesh, PartitionSpec(BATCH_AXES))
    ids = np.arange(first, first + Q, dtype=np.int32)
    placed = to_global((prompts, starts, ids), range(Q), sharding, Q)
    special = Special(tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.vocab_size)
    options = (Static(context.objective), rollout, samples, special)
    with jax.set_mesh(context.mesh):
        return jax.device_get(_completed(*options, context.params, *placed, jax.random.key(SEED)))


class Special(NamedTuple):
    """What a rollout has to know of a tokeniser."""

    eos: int
    pad: int
    bos: int
    vocab_size: int


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _completed(
    objective: Static,
    rollout: RolloutConfig,
    samples: int,
    special: Special,
    params,
    prompts,
    starts,
    ids,
    key,
) -> tuple[Rollout, jax.Array]:
    """`roll_out` and the mean entropy of each completion, whole on every device."""
    model = objective.value.module
    drawn = roll_out(
        model, params, prompts, starts, key, ids, rollout, samples,
        stop_ids=(special.eos,), pad_id=special.pad, vocab_size=special.vocab_size, forbidden_ids=(special.bos,),
    )  # fmt: skip
    given = (model, params, prompts, starts, drawn.ids, drawn.mask, rollout.temperature or 1.0)
    entropy = score_tokens(*given)[1].sum(-1) / jnp.maximum(drawn.lengths, 1)
    return jax.lax.with_sharding_constraint((drawn, entropy), PartitionSpec())


def pass_at(n: int, c: np.ndarray, k: int) -> np.ndarray:
    """1 - C(n - c, k) / C(n, k), the chance that k of n samples, c of them right, hold a right one."""
    none = [math.comb(n - int(right), k) / math.comb(n, k) for right in np.ravel(c)]
    return 1 - np.array(none).reshape(np.shape(c))


def majority_at(answers: Answers, k: int) -> np.ndarray:
    """Whether the commonest of the first k answers is right, the earliest of equally common ones; [problems]."""
    found = []
    for texts, right in zip(answers.texts, answers.right, strict=True):
        given = [text.strip() for text in texts[:k]]
        counts = collections.Counter(given)
        found.append(right[given.index(max(given, key=counts.__getitem__))])
    return np.array(found, float)


def summarize(greedy: Answers, sampled: Answers, ks: Sequence[int]) -> dict[str, float]:
    """The scalars of `run`."""
    n = sampled.right.shape[1]
    per_problem = {"accuracy": greedy.right[:, 0].astype(float), f"mean_at_{n}": sampled.right.mean(1)}
    per_problem |= {f"pass_at_{k}": pass_at(n, sampled.right.sum(1), k) for k in ks}
    per_problem |= {f"majority_at_{k}": majority_at(sampled, k) for k in ks if k > 1}
    scalars = {}
    for name, values in per_problem.items():
        scalars[name] = float(values.mean())
        scalars[f"{name}_se"] = (
            float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        )
    scalars["error"] = 1 - scalars["accuracy"]
    scalars["length"] = float(sampled.lengths.mean())
    scalars["entropy"] = float(sampled.entropy.mean())
    scalars["problems"] = float(len(greedy.right))
    return scalars


def table(problems: Sequence[Problem], greedy: Answers, sampled: Answers) -> list[dict[str, Any]]:
    """One row a problem: the greedy answer and whether it is right, how many of the samples are, the first of them."""
    rows = zip(problems, greedy.texts, greedy.right[:, 0], sampled.right, sampled.texts, strict=True)
    return [
        {
            "question": problem.question,
            "greedy": answer[0],
            "right": bool(right),
            "samples_right": int(of_samples.sum()),
            "samples": len(of_samples),
            "first_sample": texts[0],
        }
        for problem, answer, right, of_samples, texts in rows
    ]


def _figure(sampled: Answers) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    n = sampled.right.shape[1]
    ks = np.arange(1, n + 1)
    axes.plot(ks, [pass_at(n, sampled.right.sum(1), k).mean() for k in ks], marker=".", label="pass@k")
    axes.plot(ks, [majority_at(sampled, k).mean() for k in ks], marker=".", label="majority@k")
    axes.set(xlabel="k", ylabel="problems solved", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
