"""Text sampled after a prompt, to look at.

Letters: B prompts, P length of the longest, N most new tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from attnlab.data.tokenizers import Tokenizer
from attnlab.evaluation.config import EvalConfig
from attnlab.evaluation.evaluator import Context, Result
from attnlab.evaluation.scores import Static
from attnlab.models.decoding import Samples, Sampling, generate, left_pad


@dataclasses.dataclass(frozen=True)
class TextSample:
    """One sample: prompt and text after it, its number of tokens (EOS included), whether the model ended it.

    logprob is of the sample under the distribution it was drawn from, model_logprob under the model itself, in nats.
    """

    prompt: str
    text: str
    tokens: int
    finished: bool
    logprob: float
    model_logprob: float


def run(context: Context, config: EvalConfig) -> Result:
    """config.samples continuations of config.sample_prompt; scalars are means over the samples."""
    samples = sample_texts(context, [config.sample_prompt] * config.samples, config)
    tokens = sum(sample.tokens for sample in samples)
    scalars = {
        "samples": float(len(samples)),
        "tokens": tokens / len(samples),
        "finished": sum(sample.finished for sample in samples) / len(samples),
        "model_loss": -sum(sample.model_logprob for sample in samples) / tokens,  # nats a token
    }
    return Result(scalars, [dataclasses.asdict(sample) for sample in samples], text=_page(samples))


def sample_texts(context: Context, prompts: Sequence[str], config: EvalConfig) -> list[TextSample]:
    """One sample after each prompt, drawn as config says, the same on every process.

    ValueError if the longest prompt and its sample need more than config.sample_max_length positions.
    """
    encoded = [encode_prompt(context.tokenizer, prompt) for prompt in prompts]
    drawn = _generate(context, encoded, config)
    return [
        _read(context.tokenizer, prompt, ids, jax.tree.map(lambda leaf, row=row: leaf[row], drawn))
        for row, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True))
    ]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """BOS and the prompt's tokens, int32 [n + 1]: a document's beginning."""
    return np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]).astype(np.int32)


def _generate(context: Context, encoded: Sequence[np.ndarray], config: EvalConfig) -> Samples:
    tokenizer = context.tokenizer
    sampling = Sampling(
        max_new_tokens=config.sample_tokens,
        stop_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        vocab_size=tokenizer.vocab_size,
        max_length=config.sample_max_length,
    )
    prompts, starts = left_pad(encoded, tokenizer.pad_id)
    rng = jax.random.key(config.sample_seed)
    with jax.set_mesh(context.mesh):
        drawn = _replicated(Static(context.objective), sampling, context.params, prompts, starts, rng)
        return jax.device_get(drawn)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _replicated(objective: Static, sampling: Sampling, *arguments: Any) -> Samples:
    """Samples that are whole on every device, so that every process reads them."""
    drawn = generate(objective.value.module, *arguments, sampling)
    return jax.lax.with_sharding_constraint(drawn, PartitionSpec())


def _read(tokenizer: Tokenizer, prompt: str, ids: np.ndarray, drawn: Samples) -> TextSample:
    """One row of samples as text. Decoded with its prompt, as a tokeniser may write a first token differently."""
    new = drawn.tokens[: drawn.lengths]
    return TextSample(
        prompt=prompt,
        text=tokenizer.decode(np.concatenate([ids, new]))[len(tokenizer.decode(ids)) :],
        tokens=int(drawn.lengths),
        finished=bool(new[-1] == tokenizer.eos_id),
        logprob=float(drawn.logprobs.sum(dtype=np.float64)),
        model_logprob=float(drawn.raw_logprobs.sum(dtype=np.float64)),
    )


def _page(samples: Sequence[TextSample]) -> str:
    """All samples below each other, each under a line that numbers it."""
    parts = []
    for number, sample in enumerate(samples, start=1):
        end = "ended by the model" if sample.finished else "cut off"
        parts.append(f"--- {number}: {sample.tokens} tokens, {end}\n{sample.prompt}{sample.text}\n")
    return "\n".join(parts)
