"""What a completion is: its tokens up to and including the first stop token. Lengths, truncation, which groups to keep.

Letters: Q prompts, G completions of each, N completion length. Everything here takes any axes before N.

    mask_t = 1 until the first stop token, which is scored, 0 after it      (never from ids != pad: pad may be a stop)
    len = sum_t mask_t        truncated = no stop token within N
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.rl.advantages import group_moments, varies

Array = jax.Array


class Completions(NamedTuple):
    """ids int32 [..., N], padded after the end; mask bool [..., N]; lengths int32 [...]; truncated bool [...]."""

    ids: Array
    mask: Array
    lengths: Array
    truncated: Array


def finish(ids: Array, stop_ids: Sequence[int], pad_id: int) -> Completions:
    """Completions of drawn ids int [..., N]: ended at the first of any of `stop_ids`, padded with `pad_id` after it."""
    stop = jnp.isin(ids, jnp.asarray(tuple(stop_ids), ids.dtype))
    mask = jnp.cumsum(stop, axis=-1) - stop == 0
    lengths = mask.sum(-1, dtype=jnp.int32)
    return Completions(jnp.where(mask, ids, pad_id), mask, lengths, ~stop.any(-1))


def drop_truncated(mask: Array, truncated: Array) -> Array:
    """Overlong filtering (DAPO): nothing of a truncated completion is scored. Take advantages and metrics before."""
    return mask & ~truncated[..., None]


def overlong_penalty(lengths: Array, most: int, cache: int) -> Array:
    """Soft overlong punishment (DAPO, 2503.14476, equation 13) of lengths [...] in tokens, in [-1, 0].

    0 up to most - cache tokens, from there straight down to -1 at `most`, and -1 beyond.
    """
    if not 0 < cache <= most:
        raise ValueError(f"cache={cache} must be positive and at most the longest length {most}")
    slope = ((most - cache) - lengths) / cache
    return jnp.where(lengths > most, -1.0, jnp.minimum(slope, 0))


def keep_groups(rewards: Array, rows: Array | None = None) -> Array:
    """Dynamic sampling (DAPO): the groups bool [Q] whose rewards [Q, G] differ, so that they teach something.

    rewards: the sum over reward functions; NaN where a completion could not be scored. rows: bool [Q, G], False in
    padding. For rewards 0 and 1 this is an accuracy strictly between them.
    """
    scored = ~jnp.isnan(rewards)
    return varies(group_moments(rewards, scored if rows is None else scored & rows).std[:, 0])
