"""Forgetting attention: causal softmax attention with a data-dependent decay (the Forgetting Transformer).

Forgetting Transformer: Softmax Attention with a Forget Gate, arXiv 2503.02130, and Adaptive Computation Pruning for the
Forgetting Transformer, arXiv 2504.06949. Letters: B batch, T queries, S keys, H query heads, K key/value heads,
G = H / K, D head size of q and k, Dv head size of v; i a query row at position a_i = q_offset + i, j and l keys.
"""

import dataclasses

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.forgetting.arguments import Arguments, BlockSizes, canonicalize
from kernels.forgetting.blockwise import blockwise
from kernels.forgetting.gpu import pallas_gpu
from kernels.forgetting.gpu import why_unsupported as why_not_gpu
from kernels.forgetting.pruning import acp_delta, acp_end, acp_start, acp_visited_fraction
from kernels.forgetting.reference import reference
from kernels.forgetting.sharded import EXCHANGES
from kernels.forgetting.tpu import pallas_tpu
from kernels.forgetting.tpu import why_unsupported as why_not_tpu
from kernels.masks import Mask
from kernels.signatures import Array, Float, checked

__all__ = [
    "BlockSizes",
    "Mask",
    "acp_delta",
    "acp_end",
    "acp_start",
    "acp_visited_fraction",
    "forgetting_attention",
]

# In order of preference; the reference is last because its memory is quadratic in T.
IMPLEMENTATIONS = (
    Implementation("pallas_tpu", pallas_tpu, why_not_tpu, ("tpu",)),
    Implementation("pallas_gpu", pallas_gpu, why_not_gpu, ("cuda",)),
    Implementation("blockwise", blockwise),
    Implementation("reference", reference),
)


@checked
def forgetting_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    log_f: Float[Array, "B S H"] | None = None,
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    scale: float | None = None,
    acp_threshold: float | str | Float[Array, "..."] | None = None,
    log_pruning_tolerance: float = -10.0,
    decay_mode: str = "local",
    return_lse: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "B T H Dv"] | tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Softmax attention whose logits carry the log of the product of forget gates between key and query.

        D_ij = sum of log_f_l over j < l <= a_i          s_ij = scale q_i.k_j + D_ij          (2503.02130, section 3)
        o_i  = sum_j softmax_j(s_ij) v_j over the keys visible to row i,   lse_i = log sum_j exp(s_ij)

    The gate of a key does not act on the key itself, and query head h reads key/value head h // G. A row without a
    visible key gives o = 0 and lse = -inf, and gradients of zero. Scores, softmax, decay sums and accumulators are
    float32 (float64 for float64 operands).

    Args:
        q: [B, T, H, D], any float dtype.
        k: [B, S, K, D], same dtype; K divides H.
        v: [B, S, K, Dv], same dtype.
        log_f: [B, S, H] float32 (or float64), log of the gates, <= 0 and finite; None for ordinary softmax attention.
            Gates that no visible pair reads (the first token of a row or packed document, left padding, keys past
            `lengths`, segment 0) count as 0 and have a gradient of exactly zero.
        mask: visibility; see `kernels.masks.Mask`. With log_f it must be causal.
        scale: factor of q.k, D ** -0.5 by default; decay is not scaled.
        acp_threshold: prune key blocks whose decay lies below it (2504.06949): a number, an array broadcastable to
            [B, H], or "auto" = -(2U + ln S) + log_pruning_tolerance, U = max |q| max |k| scale of each batch row
            and head. What is pruned is absent from the softmax. Clamped to <= 0; no gradient.
        log_pruning_tolerance: log of the weight "auto" may give up per row (used by "auto" only).
        decay_mode: "local" sums gates in chunks and never subtracts large sums; "global" takes c_i - c_j of one
            cumulative sum c, which in float32 loses digits as |c| grows (1e-3 at |c| = 1e4).
        return_lse: also return lse.
        implementation: "blockwise" (memory linear in T and S), "reference" (dense), or None for the platform's best.
        block_sizes: query and key blocks, chosen from T and S by default. For "reference" they only matter to pruning.

    Returns:
        o [B, T, H, Dv] in q's dtype; with return_lse also lse [B, T, H], float32 (float64 for float64 operands).

    Raises:
        ValueError: shapes or dtypes that do not fit, log_f with a non-causal mask, acp_threshold without log_f, an
            unknown decay_mode, or an implementation that does not exist or cannot run here.

    Under `jax.set_mesh`, batch is split over ("data", "fsdp"), heads over "tensor" and time over "sequence", where keys
    go round in a ring; rows alone are split where queries and keys are not one sequence or blocks are pruned. See
    `kernels.dispatch.over_mesh`.
    """
    arguments = canonicalize(
        q, k, v, log_f, mask=mask, scale=scale, acp_threshold=acp_threshold, decay_mode=decay_mode,
        log_pruning_tolerance=log_pruning_tolerance, block_sizes=block_sizes,
    )  # fmt: skip
    o, lse = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local),
        arguments, _layout(arguments), ("bth.", "bth"), EXCHANGES,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def _layout(arguments: Arguments) -> Arguments:
    """The axis letters of every operand, for `dispatch.over_mesh`."""
    letters = {"q": "bth.", "k": "bsk.", "v": "bsk.", "log_f": "bsh", "threshold": "bh"}
    mask = dispatch.mask_layout(arguments.mask)
    return dataclasses.replace(dispatch.with_letters(arguments, **letters), mask=mask)
