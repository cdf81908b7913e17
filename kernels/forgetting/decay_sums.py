"""Decay as values of rows and keys, D_ij = c_{a_i} - c_j, and the gradient of the gates from theirs.

Letters: B batch, T queries, S keys, H query heads; i a row at position a_i, j a key. c are the cumulative sums of log
gates, pairs of floats (`double_decay.py`), or single ones in the "global" mode.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting import decay
from kernels.forgetting.double_decay import double_sum
from kernels.masks import Mask
from kernels.streaming.arguments import Values


def values(log_f: jax.Array, mask: Mask, T: int, mode: str) -> Values:
    """(hi, lo) of c at the T rows and at the S keys, [B, T or S, H] each, from log_f [B, S, H].

    Only the gradients of hi count: a key's is minus the sum of dS over its column. Rows past the last key have read
    the gates up to it; rows before the first one see nothing.
    """
    positions = mask.q_offset + jnp.arange(T, dtype=jnp.int32)
    runs = None
    if mask.kv_segments is not None:
        runs = jnp.cumsum(masks.unread_gates(mask, T, log_f.shape[1]), axis=1, dtype=jnp.int32)
    return _values(mode, log_f, positions, runs)


def with_row_share(lse: jax.Array, values: Values) -> jax.Array:
    """lse as it is, with the gradient of c_{a_i} that reaches it: the sum of dS over a row is exactly that of lse.

    Kernels then need no sums over rows.
    """
    hi = values.rows[0]
    return jnp.where(lse > -jnp.inf, lse + (hi - jax.lax.stop_gradient(hi)), lse)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _values(mode, log_f, positions, runs):
    if mode == "global":
        hi = jnp.cumsum(log_f, axis=1)
        sums = hi, jnp.zeros_like(hi)
    else:
        sums = tuple(x.swapaxes(1, 2) for x in double_sum(log_f.swapaxes(1, 2)))
    return Values(tuple(jnp.take(x, positions, axis=1, mode="clip") for x in sums), sums)


def _forward(mode, log_f, positions, runs):
    found = _values(mode, log_f, positions, runs)
    return found, (positions, runs)


def _backward(mode, residuals, gradients):
    positions, runs = residuals
    of_rows, dc = (x[0].swapaxes(1, 2) for x in (gradients.rows, gradients.cols))
    last = dc.shape[-1] - 1
    positions = jnp.where(positions < 0, last + 1, jnp.minimum(positions, last))
    dc = dc.at[..., positions].add(of_rows, mode="drop")
    dlog_f = decay.gate_gradient(dc, None) if runs is None else jax.vmap(decay.gate_gradient)(dc, runs)
    return dlog_f.swapaxes(1, 2), None, None


_values.defvjp(_forward, _backward)
