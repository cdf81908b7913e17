"""Sampling from a language model: filtered distributions, and a whole generation as one compiled loop.

Letters: B rows, P prompt length (left-padded), N most new tokens, V vocabulary.

A prompt is read once, then one token at a time is drawn and appended to the caches until every row has drawn a stop
token or N tokens. What a row draws depends on its prompt and its key alone: not on the rows beside it, nor their
order, nor the amount of left padding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.models.language_model import LanguageModel

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when a row ends; see `filter_logits` for temperature, top_k and top_p."""

    max_new_tokens: int  # N
    stop_ids: tuple[int, ...] = ()  # a row ends with the first of these tokens that it draws
    pad_id: int = 0  # fills the places after a row's end
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    vocab_size: int = 0  # only ids below it are drawn (a model's V may exceed its tokeniser's); 0: all V
    max_length: int = 0  # most positions P + N that the caches may take; 0: no limit

    def check(self, prompt_length: int, model_vocab: int) -> None:
        """Raise ValueError for options out of range, or a prompt that does not fit max_length."""
        _check_filter(self.temperature, self.top_k, self.top_p)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        needed = prompt_length + self.max_new_tokens
        if self.max_length and needed > self.max_length:
            raise ValueError(
                f"a prompt of {prompt_length} tokens and {self.max_new_tokens} new ones need {needed} positions, above "
                f"the limit of {self.max_length}; shorten one of them or raise the limit"
            )
        for name, value in (("vocab_size", self.vocab_size), *(("stop id", stop) for stop in self.stop_ids)):
            if not 0 <= value <= model_vocab:
                raise ValueError(f"{name}={value} must lie within the model's vocabulary of {model_vocab}")


class Samples(NamedTuple):
    """What was drawn; places at and beyond a row's length hold pad_id and 0.

    tokens int32 [B, N]; lengths int32 [B] counts a row's tokens, its stop token included; logprobs [B, N] float32 of
    the tokens under the distribution they were drawn from; raw_logprobs [B, N] under the model itself: temperature 1,
    all V tokens, so exactly what a language-modelling loss would charge.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    raw_logprobs: Array


class _State(NamedTuple):
    """index [] int32: the next place to fill; done [B] bool; what has been drawn; the model's caches."""

    index: Array
    done: Array
    drawn: Samples
    cache: Any


def filter_logits(logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Array:
    """Logits [..., V] of the distribution to draw from; excluded tokens get -inf.

    In this order: divide by `temperature`; keep the `top_k` largest (0: all); of these, renormalised, keep the
    likeliest until they hold at least `top_p` probability, the token that reaches it included. Temperature 0 keeps
    the largest alone. Of equal logits the lower id counts as the larger, so no more are kept than these numbers
    say, and the likeliest token always is.
    """
    _check_filter(temperature, top_k, top_p)
    V = logits.shape[-1]
    if temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(V) == best, jnp.zeros_like(logits), -jnp.inf)
    logits = logits / temperature
    if not top_k and top_p == 1:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k:
        ranked = jnp.where(jnp.arange(V) < top_k, ranked, -jnp.inf)
    if top_p < 1:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        ranked = jnp.where(likelier < top_p, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def _check_filter(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"{temperature=} must be at least 0 and finite; 0 draws the likeliest token")
    if top_k < 0:
        raise ValueError(f"{top_k=} is negative; 0 keeps all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must lie in (0, 1]; 1 keeps all tokens")


def left_pad(prompts: Sequence[Any], pad_id: int, length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token arrays of any lengths -> (prompts int32 [B, P], starts int32 [B], the pads of each row).

    P is the longest prompt's length, or `length` if that is more (fewer different P mean fewer compilations).
    ValueError for no prompts or an empty one.
    """
    rows = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    if not rows or not all(row.size for row in rows):
        raise ValueError(
            f"prompts of lengths {[row.size for row in rows]} need at least one token each, such as BOS"
        )
    width = max(length, *(row.size for row in rows))
    padded = np.full((len(rows), width), pad_id, np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[width - row.size :] = row
    return padded, np.array([width - row.size for row in rows], np.int32)


def row_keys(rng: Array, rows: int) -> Array:
    """Keys [B] of the rows: those given, or one key with the row's number folded in."""
    if jnp.ndim(rng) == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))
    if rng.shape != (rows,):
        raise ValueError(
            f"rng has shape {rng.shape} for {rows} rows; give one typed key, or one for each row"
        )
    return rng


def generate(
    model: LanguageModel, params: Any, prompts: Array, starts: Array, rng: Array, sampling: Sampling
) -> Samples:
    """Draw up to N tokens after each prompt. Pure and traceable; `jit_generate` compiles it.

    prompts int32 [B, P], padded on the left; starts int32 [B], the number of pads of each row (below P); rng: one typed
    key, or keys [B], with which a row is drawn alike in any batch. ValueError as `Sampling.check` says.
    """
    B, P = prompts.shape
    N = sampling.max_new_tokens
    sampling.check(P, model.config.vocab_size)
    keys = row_keys(rng, B)

    def advance(state: _State) -> _State:
        last = jax.lax.dynamic_slice_in_dim(state.drawn.tokens, state.index - 1, 1, axis=1)
        logits, cache = _append(model, params, last, state.cache)
        return _State(
            state.index + 1, *_draw(keys, logits, state.index, state.done, state.drawn, sampling), cache
        )

    def unfinished(state: _State) -> Array:
        return (state.index < N) & ~jnp.all(state.done)

    # The last token is drawn but never read, so it needs no position.
    logits, cache = _append(model, params, prompts, model.init_cache(B, P + N - 1, starts=starts))
    zeros = jnp.zeros((B, N), logits.dtype)
    nothing = Samples(jnp.full((B, N), sampling.pad_id, jnp.int32), jnp.zeros(B, jnp.int32), zeros, zeros)
    first = _draw(keys, logits, jnp.int32(0), jnp.zeros(B, bool), nothing, sampling)
    return jax.lax.while_loop(unfinished, advance, _State(jnp.int32(1), *first, cache)).drawn


def jit_generate(model: LanguageModel, sampling: Sampling) -> Callable[[Any, Array, Array, Array], Samples]:
    """`generate` compiled for one model and its options: (params, prompts, starts, rng) -> Samples.

    Keep the function: it holds what was compiled, once for each shape of prompts.
    """

    def compiled(params, prompts, starts, rng):
        return generate(model, params, prompts, starts, rng, sampling)

    return jax.jit(compiled)


def _append(model: LanguageModel, params: Any, tokens: Array, cache: Any) -> tuple[Array, Any]:
    """Append tokens [B, T] to the cache; logits [B, V] after the last one, and the new cache."""
    logits, cache = model.apply({"params": params}, tokens, cache, last_only=True, method="decode")
    return logits[:, 0], cache


def _draw(
    keys: Array, logits: Array, index: Array, done: Array, drawn: Samples, sampling: Sampling
) -> tuple[Array, Samples]:
    """Fill place `index` of the rows that are not done from logits [B, V]; returns (done [B], samples) after it."""
    allowed = jnp.arange(logits.shape[-1]) < (sampling.vocab_size or logits.shape[-1])
    filtered = filter_logits(
        jnp.where(allowed, logits, -jnp.inf), sampling.temperature, sampling.top_k, sampling.top_p
    )
    tokens = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(keys, index), filtered)

    def put(array, values, nothing):
        values = jnp.where(done, nothing, values).astype(array.dtype)
        return jax.lax.dynamic_update_slice_in_dim(array, values[:, None], index, axis=1)

    drawn = Samples(
        tokens=put(drawn.tokens, tokens, sampling.pad_id),
        lengths=drawn.lengths + ~done,
        logprobs=put(drawn.logprobs, _pick(jax.nn.log_softmax(filtered), tokens), 0),
        raw_logprobs=put(drawn.raw_logprobs, _pick(jax.nn.log_softmax(logits), tokens), 0),
    )
    return done | jnp.isin(tokens, jnp.array(sampling.stop_ids, jnp.int32)), drawn


def _pick(values: Array, tokens: Array) -> Array:
    """values [B, V] at tokens [B] -> [B]."""
    return jnp.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]
