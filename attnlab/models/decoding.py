"""Sampling from a language model: filtered distributions, and a whole generation as one compiled loop.

Letters: Q prompts, G rows drawn of each (a group), B = Q G rows, P prompt length (left-padded), N most new tokens, V
vocabulary.

A prompt is read once, its caches are repeated for its group, then one token at a time is drawn and appended to them
until every row has drawn a stop token or N tokens. What a row draws depends on its prompt and its key alone: not on the
rows beside it, nor their order, nor the amount of left padding, nor the devices that share the work.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.models.cache_rows import place_rows, repeat_rows, row_axes
from attnlab.models.language_model import LanguageModel

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when a row ends; see `filter_logits` for temperature, top_k, top_p and min_p."""

    max_new_tokens: int  # N
    stop_ids: tuple[int, ...] = ()  # a row ends with the first of these tokens that it draws
    pad_id: int = 0  # fills the places after a row's end
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0  # no stop token is among a row's first so many
    forbidden_ids: tuple[int, ...] = ()  # never drawn, such as padding and BOS
    vocab_size: int = 0  # only ids below it are drawn (a model's V may exceed its tokeniser's); 0: all V
    max_length: int = 0  # most positions P + N that the caches may take; 0: no limit

    def check(self, prompt_length: int, model_vocab: int) -> None:
        """Raise ValueError for options out of range, or a prompt that does not fit max_length."""
        _check_filter(self.temperature, self.top_k, self.top_p, self.min_p)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must lie between 0 and max_new_tokens={self.max_new_tokens}"
            )
        needed = prompt_length + self.max_new_tokens
        if self.max_length and needed > self.max_length:
            raise ValueError(
                f"a prompt of {prompt_length} tokens and {self.max_new_tokens} new ones need {needed} positions, above "
                f"the limit of {self.max_length}; shorten one of them or raise the limit"
            )
        self._check_ids(model_vocab)

    def _check_ids(self, model_vocab: int) -> None:
        if not 0 <= self.vocab_size <= model_vocab:
            raise ValueError(
                f"vocab_size={self.vocab_size} must lie within the model's vocabulary of {model_vocab}"
            )
        named = {"stop id": self.stop_ids, "forbidden id": self.forbidden_ids, "pad_id": (self.pad_id,)}
        for name, value in ((name, value) for name, values in named.items() for value in values):
            if not 0 <= value < model_vocab:
                raise ValueError(f"{name}={value} must lie within the model's vocabulary of {model_vocab}")
        both = set(self.stop_ids) & set(self.forbidden_ids)
        if both:
            raise ValueError(
                f"stop id={min(both)} is also a forbidden id, so no row could end with it; choose one"
            )
        never = self.never_drawn(model_vocab)
        if self.min_new_tokens:
            never = never | np.isin(np.arange(model_vocab), self.stop_ids)
        if never.all():
            raise ValueError(
                f"stop_ids={self.stop_ids} and forbidden_ids={self.forbidden_ids} leave none of the "
                f"{self.vocab_size or model_vocab} tokens to draw; forbid fewer"
            )

    def never_drawn(self, model_vocab: int) -> np.ndarray:
        """bool [V]: forbidden ids and those that are no token of the tokeniser."""
        ids = np.arange(model_vocab)
        return np.isin(ids, self.forbidden_ids) | (ids >= (self.vocab_size or model_vocab))


class Samples(NamedTuple):
    """What was drawn; places at and beyond a row's length hold pad_id and 0.

    tokens int32 [B, N]; lengths int32 [B] counts a row's tokens, its stop token included; logprobs [B, N] float32 of
    the tokens under the distribution they were drawn from; raw_logprobs [B, N] under the model itself: temperature 1,
    all V tokens, so exactly what a language-modelling loss would charge; policy_logprobs [B, N] at the temperature they
    were drawn with but before any filter, over all V tokens, as a trainer computes them again (raw at temperature 0).
    `generate_groups` has [Q, G] in the place of B.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    raw_logprobs: Array
    policy_logprobs: Array


class _State(NamedTuple):
    """index [] int32: the next place to fill; done [B] bool; what has been drawn; the model's caches."""

    index: Array
    done: Array
    drawn: Samples
    cache: Any


def filter_logits(
    logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Array:
    """Logits [..., V] of the distribution to draw from; excluded tokens get -inf.

    In this order: divide by `temperature`; keep the `top_k` largest (0: all); of these, renormalised, keep the
    likeliest until they hold at least `top_p` probability, the token that reaches it included; of these keep those at
    least `min_p` times as likely as the likeliest. Temperature 0 keeps the largest alone. Of equal logits the lower id
    counts as the larger, so top_k and top_p keep no more than these numbers say, and the likeliest token always stays.
    """
    _check_filter(temperature, top_k, top_p, min_p)
    V = logits.shape[-1]
    if temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(V) == best, jnp.zeros_like(logits), -jnp.inf)
    logits = logits / temperature
    if top_k or top_p < 1:
        logits = _keep_likeliest(logits, top_k, top_p)
    if min_p:
        least = jnp.max(logits, axis=-1, keepdims=True) + np.log(min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _keep_likeliest(logits: Array, top_k: int, top_p: float) -> Array:
    """top_k, then top_p: both count tokens in the order of their probability."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k:
        ranked = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ranked, -jnp.inf)
    if top_p < 1:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        ranked = jnp.where(likelier < top_p, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def _check_filter(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"{temperature=} must be at least 0 and finite; 0 draws the likeliest token")
    if top_k < 0:
        raise ValueError(f"{top_k=} is negative; 0 keeps all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must lie in (0, 1]; 1 keeps all tokens")
    if not 0 <= min_p <= 1:
        raise ValueError(f"{min_p=} must lie in [0, 1]; 0 keeps all tokens")


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
    keys = row_keys(rng, len(prompts))
    drawn = generate_groups(model, params, prompts, starts, keys[:, None], sampling)
    return jax.tree.map(lambda leaf: leaf[:, 0], drawn)


def generate_groups(
    model: LanguageModel,
    params: Any,
    prompts: Array,
    starts: Array,
    keys: Array,
    sampling: Sampling,
    valid: Array | None = None,
) -> Samples:
    """Draw G rows of up to N tokens after each prompt, which is read once. Pure and traceable.

    prompts int32 [Q, P] and starts int32 [Q] as above; keys [Q, G], typed; valid bool [Q]: False for prompts that only
    fill the batch, whose rows stay empty and hold nobody up. Samples have [Q, G] in the place of B.

    Under `jax.set_mesh` rows are split over the data and fsdp axes, whole groups where these divide Q.
    """
    (Q, P), G, N = prompts.shape, keys.shape[1], sampling.max_new_tokens
    sampling.check(P, model.config.vocab_size)
    length = P + N - 1  # the last token is drawn but never read, so it needs no position
    axes = row_axes(model, length)

    def append(tokens: Array, cache: Any) -> tuple[Array, Any]:
        """Append tokens [B, T]: logits [B, V] after the last one, and the new cache."""
        logits, cache = model.apply({"params": params}, tokens, cache, last_only=True, method="decode")
        return place_rows(logits[:, 0]), place_rows(cache, axes)

    def advance(state: _State) -> _State:
        last = jax.lax.dynamic_slice_in_dim(state.drawn.tokens, state.index - 1, 1, axis=1)
        logits, cache = append(last, state.cache)
        done, drawn = _draw(keys.reshape(-1), logits, state.index, state.done, state.drawn, sampling)
        return _State(state.index + 1, done, drawn, cache)

    def unfinished(state: _State) -> Array:
        return (state.index < N) & ~jnp.all(state.done)

    logits, cache = append(place_rows(prompts), place_rows(model.init_cache(Q, length, starts=starts), axes))
    logits = place_rows(jnp.repeat(logits, G, axis=0))
    cache = place_rows(repeat_rows(cache, axes, G), axes)
    done = jnp.zeros(Q * G, bool) if valid is None else jnp.repeat(~valid, G)
    nothing = place_rows(_nothing(Q * G, N, sampling.pad_id, logits.dtype))
    first = _draw(keys.reshape(-1), logits, jnp.int32(0), done, nothing, sampling)
    drawn = jax.lax.while_loop(unfinished, advance, _State(jnp.int32(1), *first, cache)).drawn
    return jax.tree.map(lambda leaf: leaf.reshape(Q, G, *leaf.shape[1:]), drawn)


def _nothing(rows: int, length: int, pad_id: int, dtype) -> Samples:
    zeros = jnp.zeros((rows, length), dtype)
    tokens, lengths = jnp.full((rows, length), pad_id, jnp.int32), jnp.zeros(rows, jnp.int32)
    return Samples(tokens, lengths, logprobs=zeros, raw_logprobs=zeros, policy_logprobs=zeros)


def jit_generate(model: LanguageModel, sampling: Sampling) -> Callable[[Any, Array, Array, Array], Samples]:
    """`generate` compiled for one model and its options: (params, prompts, starts, rng) -> Samples.

    Keep the function: it holds what was compiled, once for each shape of prompts.
    """

    def compiled(params, prompts, starts, rng):
        return generate(model, params, prompts, starts, rng, sampling)

    return jax.jit(compiled)


def _draw(
    keys: Array, logits: Array, index: Array, done: Array, drawn: Samples, sampling: Sampling
) -> tuple[Array, Samples]:
    """Fill place `index` of the rows that are not done from logits [B, V]; returns (done [B], samples) after it."""
    filtered = filter_logits(
        _exclude(logits, index, sampling),
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
    )
    tokens = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(keys, index), filtered)

    def put(array, values, nothing):
        values = jnp.where(done, nothing, values).astype(array.dtype)
        return jax.lax.dynamic_update_slice_in_dim(array, values[:, None], index, axis=1)

    drawn = Samples(
        tokens=put(drawn.tokens, tokens, sampling.pad_id),
        lengths=drawn.lengths + ~done,
        logprobs=put(drawn.logprobs, _log_prob(filtered, tokens), 0),
        raw_logprobs=put(drawn.raw_logprobs, _log_prob(logits, tokens), 0),
        policy_logprobs=put(
            drawn.policy_logprobs, _log_prob(logits / (sampling.temperature or 1.0), tokens), 0
        ),
    )
    return done | jnp.isin(tokens, jnp.array(sampling.stop_ids, jnp.int32)), drawn


def _exclude(logits: Array, index: Array, sampling: Sampling) -> Array:
    """-inf for what place `index` must not hold, before any filter."""
    never = sampling.never_drawn(logits.shape[-1])
    if never.any():
        logits = jnp.where(never, -jnp.inf, logits)
    if sampling.stop_ids and sampling.min_new_tokens:
        stops = np.isin(np.arange(logits.shape[-1]), sampling.stop_ids)
        logits = jnp.where(stops & (index < sampling.min_new_tokens), -jnp.inf, logits)
    return logits


def _log_prob(logits: Array, tokens: Array) -> Array:
    """log softmax of logits [B, V] at tokens [B] -> [B]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]
