"""Rollouts: groups of completions drawn from the policy, and what a policy says about completions that are there.

Letters: Q prompts, G completions of each (a group), B = Q G rows, P prompt length (left-padded), N completion length
(right-padded), V vocabulary, C channels. x are logits divided by the rollout's temperature, over all V tokens:

    logp_t = x_t[id_t] - log sum_v e^(x_tv)          H_t = - sum_v p_tv log p_tv,   p_t = softmax(x_t)

The sampler and the trainer use the same temperature and the same V, so that their ratio is 1 when nothing has changed;
what top_k, top_p, min_p and forbidden tokens do to the distribution drawn from is in `filtered_logp` alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.data.tokenizers import Tokenizer
from attnlab.models.decoding import Sampling, generate_groups
from attnlab.models.language_model import LanguageModel
from attnlab.models.placement import constrain_hidden
from attnlab.models.unrolled import unrolled
from attnlab.rl.config import RolloutConfig

Array = jax.Array


class Rollout(NamedTuple):
    """Completions; [Q, G, N] unless said otherwise, and 0 (ids: pad_id) where mask is False.

    ids int32; mask bool, True up to the first stop token, itself included; logp float32 under the policy at the
    rollout's temperature; filtered_logp float32 under the distribution drawn from; truncated bool [Q, G]: no stop token
    within N; lengths int32 [Q, G]: the places of the mask.
    """

    ids: Array
    mask: Array
    logp: Array
    filtered_logp: Array
    truncated: Array
    lengths: Array


def roll_out(
    model: LanguageModel,
    params: Any,
    prompts: Array,
    starts: Array,
    key: Array,
    prompt_ids: Array,
    config: RolloutConfig,
    group_size: int,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    vocab_size: int = 0,
    forbidden_ids: Sequence[int] = (),
    valid: Array | None = None,
) -> Rollout:
    """Draw group_size completions of each prompt. Pure and traceable.

    prompts int32 [Q, P], left-padded; starts int32 [Q], the pads of each; key typed, of this rollout; prompt_ids int32
    [Q], a number of the prompt's own: what is drawn for it depends on key, number and prompt alone, not on its place in
    the batch nor on the mesh. Only ids below vocab_size (0: all V) are drawn, and neither forbidden_ids nor padding
    (unless it stops a row). valid bool [Q]: False for prompts that only fill the batch; their masks are empty.
    """
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        stop_ids=tuple(stop_ids),
        pad_id=pad_id,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        min_new_tokens=config.min_new_tokens,
        forbidden_ids=tuple(sorted({*forbidden_ids, pad_id} - set(stop_ids))),
        vocab_size=vocab_size,
    )
    keys = completion_keys(key, prompt_ids, group_size)
    model, params = unrolled(model, params) if config.unroll_layers else (model, params)
    drawn = generate_groups(model, params, prompts, starts, keys, sampling, valid)
    mask = jnp.arange(config.max_new_tokens) < drawn.lengths[..., None]
    stopped = mask & jnp.isin(drawn.tokens, jnp.array(sampling.stop_ids, jnp.int32))
    return Rollout(
        ids=drawn.tokens,
        mask=mask,
        logp=drawn.policy_logprobs,
        filtered_logp=drawn.logprobs,
        truncated=(drawn.lengths > 0) & ~stopped.any(axis=-1),
        lengths=drawn.lengths,
    )


def completion_keys(key: Array, prompt_ids: Array, group_size: int) -> Array:
    """Keys [Q, G]: of completion g of a prompt `fold_in(key, prompt id * G + g)`."""
    rows = prompt_ids.astype(jnp.uint32)[:, None] * group_size + jnp.arange(group_size, dtype=jnp.uint32)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, rows)


def score_tokens(
    model: LanguageModel,
    params: Any,
    prompts: Array,
    starts: Array,
    ids: Array,
    mask: Array,
    temperature: float,
    *,
    return_entropy: bool = True,
    implementation: str | None = None,
) -> tuple[Array, Array | None]:
    """(logp, H), both [Q, G, N] float32 nats, of completions by one parallel pass; differentiable in params.

    prompts [Q, P] and starts [Q] as in `roll_out`; ids int32 [Q, G, N]; mask bool [Q, G, N]. Places without mask are
    exactly 0 with gradients of exactly 0, whatever ids they hold: they come after all others of their row, so nothing
    sees them. H is None without return_entropy; implementation is that of `kernels.log_prob.token_log_probs`.
    """
    (Q, P), (_, G, N) = prompts.shape, ids.shape
    completions = ids.reshape(Q * G, N)
    tokens = jnp.concatenate([jnp.repeat(prompts, G, axis=0), completions], axis=1)
    hidden = model.apply({"params": params}, tokens, starts=jnp.repeat(starts, G), method="hidden")
    found = model.apply(
        {"params": params},
        constrain_hidden(hidden[:, P - 1 : -1]),  # place P - 1 + t predicts token t of the completion
        completions,
        mask=mask.reshape(Q * G, N),
        temperature=temperature,
        return_entropy=return_entropy,
        implementation=implementation,
        method="head_log_probs",
    )
    return found.logp.reshape(Q, G, N), found.entropy.reshape(Q, G, N) if return_entropy else None


def completion_texts(
    tokenizer: Tokenizer, prompts: np.ndarray, starts: np.ndarray, rollout: Rollout
) -> list[list[str]]:
    """Texts of Q groups of G completions, without their stop tokens; for a rollout on the host.

    Decoded after their prompts, as a tokeniser may write a first token differently.
    """
    texts = []
    for prompt, start, ids, lengths, truncated in zip(
        prompts, starts, rollout.ids, rollout.lengths, rollout.truncated, strict=True
    ):
        before = np.asarray(prompt)[start:]
        skipped = len(tokenizer.decode(before))
        ends = np.where(truncated, lengths, np.maximum(lengths - 1, 0))
        rows = (np.concatenate([before, row[:end]]) for row, end in zip(ids, ends, strict=True))
        texts.append([tokenizer.decode(row)[skipped:] for row in rows])
    return texts
