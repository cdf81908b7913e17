"""What the weights of row-normalised attention look like: how wide they spread, and how much sits on the first key.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size; R weights of a row, n its visible
keys.

    entropy = -sum_j R_j log R_j      effective keys = 1 / sum_j R_j^2      sink = R of the first visible key
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnlab.attention.normalised_family import Form, find_form, kernel_options, unit_vectors
from kernels import masks
from kernels.masks import Mask
from kernels.signatures import Array, Bool, Float, checked
from kernels.softplus import softplus_weights


@checked
def row_metrics(
    weights: Float[Array, "B H T S"], visible: Bool[Array, "_ T S"]
) -> dict[str, Float[Array, "B H T"]]:
    """What one row of weights looks like; weights that do not sum to 1 are divided by their sum, empty rows give 0.

    entropy: -sum R log R, in nats.      effective_keys: 1 / sum R^2, between 1 and n.
    first_key_weight: weight of the first visible key (key 0 of a plain sequence): the attention sink.
    above_threshold: fraction of the visible keys with a weight above 0.
    """
    visible = visible[:, None]
    total = weights.sum(-1, keepdims=True)
    R = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
    first = jnp.argmax(jnp.broadcast_to(visible, weights.shape), axis=-1, keepdims=True)
    squares, n = jnp.sum(R * R, -1), visible.sum(-1)
    return {
        "entropy": -jnp.sum(R * jnp.log(jnp.where(R > 0, R, 1)), -1),
        "effective_keys": jnp.where(squares > 0, 1 / jnp.where(squares > 0, squares, 1), 0),
        "first_key_weight": jnp.take_along_axis(R, first, -1)[..., 0],
        "above_threshold": (R > 0).sum(-1) / jnp.maximum(n, 1),
    }


@checked
def attention_metrics(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    form: Form | str = "lssar",
    learned_scale: Float[Array, " H"] | None = None,
    learned_power: Float[Array, " H"] | None = None,
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    counts: float | None = None,
    logit_gain: float | None = None,
    block: int = 128,
    **options,
) -> dict[str, Float[Array, " H"]]:
    """Means of `row_metrics` over all rows that see a key, per head, and degenerate_rows: the fraction of them without
    a key above the threshold. Rows are taken `block` at a time, so memory is linear in S. float32, no gradient.

    q, k and the options as for `family_attention`, but `counts` is one number.
    """
    form = find_form(form)
    if form.qk_norm:
        q, k = unit_vectors(q), unit_vectors(k)
    (B, T, H, D), S = q.shape, k.shape[1]
    options |= {"counts": counts} | kernel_options(form, H, D, learned_scale, learned_power, logit_gain)
    mask = masks.validate(mask, B, T, S)
    blocks = jnp.pad(q, ((0, 0), (0, -T % block), (0, 0), (0, 0))).reshape(B, -1, block, H, D)
    firsts = jnp.arange(blocks.shape[1]) * block
    of_rows = functools.partial(_sums_of_rows, k=k, mask=mask, T=T, options=options)
    sums = jax.lax.map(lambda x: of_rows(*x), (blocks.swapaxes(0, 1), firsts))
    sums = jax.tree.map(lambda x: x.sum(0), sums)
    rows = jnp.maximum(sums.pop("rows"), 1)
    return jax.lax.stop_gradient({name: x / rows for name, x in sums.items()})


def _sums_of_rows(q, first, *, k, mask, T, options):
    """Sums per head over the rows of q [B, block, H, D], which begin at row `first`; rows past T are padding."""
    at = first + jnp.arange(q.shape[1])
    mask = dataclasses.replace(mask, q_offset=mask.q_offset + first)
    if mask.q_segments is not None:
        of_rows = jnp.take(mask.q_segments, at, axis=1, mode="fill", fill_value=0)
        mask = dataclasses.replace(mask, q_segments=of_rows)
    visible = masks.dense(mask, q.shape[1], k.shape[1])
    R, statistics = softplus_weights(q, k, mask=mask, **options)
    metrics = row_metrics(R, visible)
    flat = jnp.zeros(R.shape[:3], bool) if options["power"] is None else statistics.M.swapaxes(1, 2) == 0
    metrics |= {"degenerate_rows": flat.astype(R.dtype), "rows": jnp.ones(R.shape[:3], R.dtype)}
    sees = (visible.any(-1) & (at < T))[:, None]
    return {name: jnp.where(sees, x, 0).sum((0, 2)) for name, x in metrics.items()}
