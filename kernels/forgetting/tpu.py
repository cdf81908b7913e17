"""Forgetting attention on TPU: the kernels of streaming attention with a decay added to the score and pruned blocks
left out. Without gates they are those of softmax attention.

Letters: B batch, T queries, S keys, H query heads; m one of nq query blocks, n one of nk key blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.forgetting import decay_sums, pruning
from kernels.forgetting.arguments import Arguments
from kernels.streaming import tpu, tpu_plan
from kernels.streaming.arguments import Values
from kernels.streaming.scores import DotProduct
from kernels.tiles import LN2, LOG2E


def pallas_tpu(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] in q's dtype and lse float32 [B, T, H] (-inf where no key is visible)."""
    a, T, S = arguments, arguments.q.shape[1], arguments.k.shape[1]
    sizes = a.block_sizes if a.sizes_given else tpu_plan.choose(T, S, a.q.dtype)
    kept = None
    if a.threshold is not None:
        start = dataclasses.replace(a, block_sizes=sizes).acp_start()
        kept = pruning.kept_blocks(start, -(-S // sizes.k))
    if a.log_f is None:
        return tpu.attend(DotProduct(a.scale), a.q, a.k, a.v, Values(), a.mask, sizes)
    values = decay_sums.values(a.log_f * LOG2E, a.mask, T, a.decay_mode)
    o, lse = tpu.attend(DotProduct(a.scale), a.q, a.k, a.v, values, a.mask, sizes, decays=True, kept=kept)
    return o, decay_sums.with_row_share(lse, jax.tree.map(lambda c: LN2 * c, values))


def why_unsupported(arguments: Arguments) -> str | None:
    """One sentence, or None if the kernels can run."""
    if arguments.accumulator == jnp.float64:
        return 'TPU kernels have no float64; cast to float32 or use implementation="blockwise"'
    return None
