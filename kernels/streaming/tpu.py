"""Streaming attention on TPU: Pallas kernels, forward and backward, for any elementwise score.

`tpu_plan.py` lays the operands out and finds the blocks to visit, `tpu_forward.py` and `tpu_backward.py` hold the
kernels, `tpu_tile.py` the scores of a tile; this file joins them with a custom VJP. Memory beside the operands is a few
vectors of length T and S. Letters as in `tpu_plan.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import pallas
from kernels.forgetting.arguments import BlockSizes
from kernels.masks import Mask
from kernels.streaming import tpu_plan
from kernels.streaming.arguments import Arguments, Values
from kernels.streaming.tpu_backward import backward_kv, backward_q
from kernels.streaming.tpu_forward import forward
from kernels.streaming.tpu_plan import Plan, Visits
from kernels.tiles import LN2, LOG2E

UNSEEING = 1e30  # lse of a row without a visible key, for the backward pass: every exponential becomes zero


def pallas_tpu(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] in q's dtype and lse float32 [B, T, H] (-inf where no key is visible)."""
    a = arguments
    return attend(a.score, a.q, a.k, a.v, a.values, a.mask, a.block_sizes)


def attend(
    score, q, k, v, values: Values, mask: Mask, sizes: BlockSizes | None = None, *, decays=False, kept=None
) -> tuple[jax.Array, jax.Array]:
    """o and lse of public operands. `decays`, see `tpu_plan.Plan`; `kept` bool [B, H, nq, nk] leaves out blocks.

    Of a decay the gradient of (hi, lo) of the keys arrives in hi, and none at that of the rows: add it to lse.
    """
    dtype, T = q.dtype, q.shape[1]
    q, k, v = (
        x.astype(jnp.float32) if x.dtype == jnp.float16 else x for x in (q, k, v)
    )  # no such matrix units
    sizes = sizes or tpu_plan.choose(T, k.shape[1], q.dtype)
    plan, visits = tpu_plan.make(score, mask, q, k, v, sizes, pallas.interpret(), decays=decays, kept=kept)
    of_rows, of_cols = (sizes.q, plan.queries_a_fetch), (sizes.k, plan.keys_a_fetch)
    o, lse = _attend(
        plan, tpu_plan.blocks(q, *of_rows), tpu_plan.blocks(k, *of_cols), tpu_plan.blocks(v, *of_cols),
        tpu_plan.vectors(values.rows, *of_rows), tpu_plan.vectors(values.cols, *of_cols),
        tpu_plan.scalar_vectors(values.extras), visits,
    )  # fmt: skip
    return tpu_plan.unblock(o, T).astype(dtype), tpu_plan.unblock(lse.swapaxes(-1, -2), T)[..., 0]


def why_unsupported(arguments: Arguments) -> str | None:
    """Float64 has no kernel."""
    if arguments.accumulator == jnp.float64:
        return 'TPU kernels have no float64; cast to float32 or use implementation="blockwise"'
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, rows, cols, extras, visits: Visits):
    return forward(plan, q, k, v, rows, cols, extras, visits)


def _forward(plan, q, k, v, rows, cols, extras, visits):
    o, lse = forward(plan, q, k, v, rows, cols, extras, visits)
    return (o, lse), (q, k, v, rows, cols, extras, visits, o, lse)


def _backward(plan, residuals, cotangents):
    q, k, v, rows, cols, extras, visits, o, lse = residuals
    do, dlse = cotangents
    some = lse > -jnp.inf
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1)[..., None, :] - dlse
    stats = jnp.concatenate([jnp.where(some, lse * LOG2E, UNSEEING), jnp.where(some, delta, 0)], -2)
    dq, drows, dextras = backward_q(plan, q, k, v, rows, cols, extras, stats, do, visits)
    dk, dv, dcols = backward_kv(plan, q, k, v, rows, cols, extras, stats, do, visits)
    if plan.decays:  # c is in units of log 2, and the sums are those of dS
        dcols = jnp.pad(-LN2 * dcols, [(0, 0)] * 3 + [(0, 1), (0, 0)])
    if extras is not None:  # every lane holds the sum over one query block
        dextras = jnp.zeros_like(extras).at[:, :, 0].set(dextras[..., 0].sum((0, 2)))
    return dq, dk, dv, drows, dcols, dextras, None


_attend.defvjp(_forward, _backward)
