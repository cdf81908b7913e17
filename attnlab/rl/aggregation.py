"""From losses of tokens to one number, as (sum, weight): those of shards and micro-batches add up before the division.

Letters: Q prompts, G completions of each, N completion length; i a completion, len_i its scored tokens, C a constant.

    seq_mean_token_mean   mean_i (sum_t l_it / len_i)                 GRPO, 2402.03300
    token_mean            sum_it l_it / sum_i len_i                   DAPO, 2503.14476
    seq_sum_const         sum_it l_it / (rows C)                      Dr.GRPO, 2503.20783; C the longest completion
    seq_mean_token_sum    mean_i (sum_t l_it)

Rows are those with a scored token, or all real ones with count_empty_rows.
"""

import jax.numpy as jnp

from attnlab.rl.config import GRPOConfig
from attnlab.rl.masked import row_mean, wide, zeroed
from kernels.signatures import Array, Bool, Float, checked


def _seq_mean_token_mean(config, loss, mask, count):
    return row_mean(loss, mask).sum(), count


def _token_mean(config, loss, mask, count):
    return loss.sum(), mask.sum()


def _seq_sum_const(config, loss, mask, count):
    return loss.sum(), count * (config.loss_length or config.rollout.max_new_tokens)


def _seq_mean_token_sum(config, loss, mask, count):
    return loss.sum(), count


AGGREGATIONS = {
    "seq_mean_token_mean": _seq_mean_token_mean,
    "token_mean": _token_mean,
    "seq_sum_const": _seq_sum_const,
    "seq_mean_token_sum": _seq_mean_token_sum,
}  # name -> (config, losses zero where not scored, mask, number of rows) -> (sum, weight)


@checked
def aggregate(
    config: GRPOConfig,
    loss: Float[Array, "Q G N"],
    mask: Bool[Array, "Q G N"],
    *,
    rows: Bool[Array, "Q G"] | None = None,
) -> tuple[Array, Array]:
    """(sum, weight), scalars, by the option `config.aggregation`; `divide` the added-up pairs.

    rows: False in padding, which count_empty_rows does not count.
    """
    counted = mask.any(-1)
    if config.count_empty_rows:
        counted = jnp.ones_like(counted) if rows is None else rows
    count = wide(counted).sum()
    total, weight = AGGREGATIONS[config.aggregation](config, zeroed(loss, mask), mask, count)
    return total, weight.astype(total.dtype)


def divide(total: Array, weight: Array) -> Array:
    """sum / weight, the weight at least 1: a batch with nothing scored has loss 0."""
    return total / jnp.maximum(weight, 1)
