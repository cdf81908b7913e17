"""Entropy-guided sequence weighting (EGSW), arXiv 2503.22456: completions of a group compete for weight by a softmax.

Letters: Q prompts, G completions of each (a group), N completion length; i, j rows of one group, t a token, n the rows
that take part; A advantage, H entropy of the policy in nats, P temperature.

    w_it = n e^((A_it + alpha H_it) / P) / sum_j e^((A_jt + alpha H_jt) / P)

    trajectory   A_i and H_i of the whole completion (mean, sum or largest of its tokens); one weight a completion
    step         at each t over the rows still alive there, or over all with H = 0 in those that have ended

With scale "unit" the factor n is left out: weights then sum to 1, as printed. With it they average 1, since GRPO
divides by G already, and P = infinity is GRPO exactly. Rows without scored tokens take no part and get 0.
"""

import math

import jax
import jax.numpy as jnp

from attnlab.rl.config import SequenceWeightConfig
from attnlab.rl.masked import per_token, pooled_mean, row_mean, wide, zeroed
from kernels.signatures import Array, Bool, Float, checked

ABSENT = -1e30  # score of a row that takes no part; finite, or a group without any would be NaN


def present_rows(mask: Array, rows: Array | None = None) -> Array:
    """Which completions take part, bool [Q, G]: those with a scored token that `rows` does not leave out."""
    alive = mask.any(-1)
    return alive if rows is None else alive & rows


def sequence_entropy(config: SequenceWeightConfig, entropy: Array, mask: Array, vocab_size: int = 0) -> Array:
    """H_i [Q, G] of token entropies [Q, G, N]; 0 in rows without scored tokens."""
    H = zeroed(entropy, mask)
    aggregated = {"mean": lambda: row_mean(H, mask), "sum": lambda: H.sum(-1), "max": lambda: H.max(-1)}
    return aggregated[config.entropy_agg]() / _unit_of_entropy(config, vocab_size)


def _unit_of_entropy(config: SequenceWeightConfig, vocab_size: int) -> float:
    if config.entropy_norm == "none":
        return 1.0
    if vocab_size < 2:
        raise ValueError(f"entropy_norm='log_vocab' needs the vocabulary's size, got {vocab_size=}")
    return math.log(vocab_size)


def _group_softmax(score: Array, members: Array, config: SequenceWeightConfig) -> Array:
    """Over axis 1 among the members; the others get 0."""
    score = jnp.where(members, score, ABSENT)
    top = jax.lax.stop_gradient(score.max(1, keepdims=True))
    raw = jnp.where(members, jnp.exp((score - top) / config.temperature), 0)
    n = members.sum(1, keepdims=True) if config.scale == "group" else 1
    total = raw.sum(1, keepdims=True)
    return raw * (n / jnp.where(total > 0, total, 1))  # only empty groups have a total of 0


def _none(config, advantages, entropy, mask, vocab_size, rows):
    """1 for every row that is there."""
    return wide(present_rows(mask, rows))


def _egsw(config, advantages, entropy, mask, vocab_size, rows):
    there = present_rows(mask, rows)
    A = jax.lax.stop_gradient(advantages)
    if config.mode == "trajectory":
        A = A if A.ndim == 2 else row_mean(A, mask)
        H = sequence_entropy(config, entropy, mask, vocab_size)
        return _group_softmax(zeroed(A, there) + config.alpha * H, there, config)
    alive = mask & there[..., None]
    members = alive if config.step_members == "alive" else jnp.broadcast_to(there[..., None], mask.shape)
    A = zeroed(per_token(A), members if A.ndim == 2 else alive)
    H = zeroed(entropy, alive) / _unit_of_entropy(config, vocab_size)
    return jnp.where(alive, _group_softmax(A + config.alpha * H, members, config), 0)


SEQUENCE_WEIGHTS = {"none": _none, "egsw": _egsw}


@checked
def sequence_weights(
    config: SequenceWeightConfig,
    advantages: Float[Array, "Q G"] | Float[Array, "Q G N"],
    entropy: Float[Array, "Q G N"] | None,
    mask: Bool[Array, "Q G N"],
    vocab_size: int = 0,
    *,
    rows: Bool[Array, "Q G"] | None = None,
) -> Float[Array, "Q G"] | Float[Array, "Q G N"]:
    """Weights of completions [Q, G], or of tokens [Q, G, N] in mode "step" (2503.22456, the weight equation).

    Args:
        advantages: tokens' advantages count with their mean in mode "trajectory".
        entropy: of the policy, nats; None will do for the name "none".
        vocab_size: V, for entropy_norm="log_vocab".
        rows: False for rows that take no part although they have scored tokens, such as unscorable ones.

    Gradients go to the entropy only with stop_gradient=False, and never to the advantages.
    """
    w = SEQUENCE_WEIGHTS[config.name](config, advantages, entropy, mask, vocab_size, rows)
    return jax.lax.stop_gradient(w) if config.stop_gradient else w


def _within_groups(x: Array, members: Array) -> Array:
    """x less the mean of its group's members; 0 elsewhere."""
    mean = zeroed(x, members).sum(1, keepdims=True) / jnp.maximum(members.sum(1, keepdims=True), 1)
    return zeroed(x - mean, members)


def _ratio(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def statistics(
    config: SequenceWeightConfig,
    weights: Array,
    advantages: Array,
    entropy: Array,
    mask: Array,
    vocab_size: int = 0,
    *,
    rows: Array | None = None,
) -> dict[str, Array]:
    """Metrics "egsw/..." of what `sequence_weights` made of the same arguments, scalars.

    Of groups (in mode "step": of groups at a token) with a member. ess: 1 / (n sum w^2), weights summing to 1, mean
    over groups; mass_positive: mean weight of rows with A > 0; corr_*: correlation of weights with A and with H, both
    taken from their group's mean; share_of_entropy_term: std(alpha H) / std(A) within groups.
    """
    there = present_rows(mask, rows)
    H_row = sequence_entropy(config, entropy, mask, vocab_size)
    step = weights.ndim == 3
    members = mask & there[..., None] if step else there[..., None]
    H = zeroed(entropy, members) / _unit_of_entropy(config, vocab_size) if step else H_row[..., None]
    A = per_token(advantages) if step or advantages.ndim == 2 else row_mean(advantages, mask)[..., None]
    w, A = zeroed(per_token(weights), members), zeroed(A, members)
    unit = w / jnp.maximum(w.sum(1, keepdims=True), jnp.finfo(w.dtype).tiny)
    groups, n = members.any(1), members.sum(1)
    dw, dA, dH = (_within_groups(x, members) for x in (w, A, H))
    norm_w, norm_A, norm_H = (jnp.sqrt(jnp.square(x).sum()) for x in (dw, dA, dH))
    H_mean = pooled_mean(H_row, there)
    found = {
        "weight_min": jnp.where(members.any(), jnp.where(members, w, jnp.inf).min(), 0),
        "weight_max": w.max(),
        "ess": pooled_mean(_ratio(1.0, n * jnp.square(unit).sum(1)), groups),
        "entropy_seq_mean": H_mean,
        "entropy_seq_std": jnp.sqrt(pooled_mean(jnp.square(H_row - H_mean), there)),
        "mass_positive": pooled_mean(jnp.where(A > 0, unit, 0).sum(1), groups),
        "corr_adv": _ratio((dw * dA).sum(), norm_w * norm_A),
        "corr_entropy": _ratio((dw * dH).sum(), norm_w * norm_H),
        "share_of_entropy_term": _ratio(abs(config.alpha) * norm_H, norm_A),
    }
    return {f"egsw/{name}": jax.lax.stop_gradient(x) for name, x in found.items()}
