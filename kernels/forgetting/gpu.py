"""Forgetting attention on a GPU: the kernels of streaming attention with decay in the score and pruned blocks left out.

Letters: B batch, T queries, S keys, H query heads; nq blocks of queries.
"""

from functools import partial

import jax

from kernels.forgetting import decay_sums, pruning
from kernels.forgetting.arguments import Arguments
from kernels.streaming import gpu as streaming
from kernels.streaming.arguments import Values
from kernels.streaming.decay_score import Decay
from kernels.streaming.scores import DotProduct


def pallas_gpu(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] in q's dtype and lse [B, T, H] float32 (-inf where no key is visible)."""
    a = arguments
    attend = partial(
        streaming.attend, "forgetting", q=a.q, k=a.k, v=a.v, mask=a.mask,
        sizes=a.block_sizes if a.sizes_given else None,
        prune=None if a.threshold is None else partial(_first_kept, a),
    )  # fmt: skip
    if a.log_f is None:
        return attend(DotProduct(a.scale), values=Values(), wants=Values())
    values = decay_sums.values(a.log_f, a.mask, a.q.shape[1], a.decay_mode)
    wants = Values(rows=(False, False), cols=(True, False))
    o, lse = attend(Decay(a.scale), values=values, wants=wants)
    return o, decay_sums.with_row_share(lse, values)


def why_unsupported(arguments: Arguments) -> str | None:
    """One sentence, or None if the kernels can run."""
    a = arguments
    return streaming.why_not(a.q, a.v, a.block_sizes if a.sizes_given else None)


def _first_kept(arguments, block_q, block_k):
    """First key block each query block keeps under the threshold, int32 [B, H, nq]."""
    a = arguments
    return pruning.acp_start(a.log_f, a.threshold, a.mask.q_offset, a.q.shape[1], block_q, block_k)
