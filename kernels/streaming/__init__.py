"""Row-normalised attention for any score that is an elementwise function of q.k, streamed over the keys.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size of q and k, Dv head size
of v; i a query row at position a_i = q_offset + i, j a key, u and w numbers of rows and of keys (norms, biases).

    s_ij = score(q_i.k_j, a_i, j, u_i, w_j, extras)     o_i = sum_j softmax_j(s_ij) v_j     lse_i = log sum_j exp(s_ij)

Both sums run over the keys visible to row i. A paper writes its score once, elementwise; the products, the softmax, the
masks and the gradient (`jax.vjp` of the score, block by block, between products by hand) are here.
"""

import dataclasses

import jax

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.forgetting.arguments import BlockSizes
from kernels.masks import Mask
from kernels.signatures import Array, Float, checked
from kernels.streaming.arguments import Arguments, Score, Values, canonicalize
from kernels.streaming.blockwise import blockwise
from kernels.streaming.gpu import pallas_gpu
from kernels.streaming.gpu import why_unsupported as why_not_gpu
from kernels.streaming.merge import merge
from kernels.streaming.reference import reference
from kernels.streaming.scores import DotProduct, product
from kernels.streaming.sharded import EXCHANGES
from kernels.streaming.tpu import pallas_tpu
from kernels.streaming.tpu import why_unsupported as why_not_tpu

__all__ = ["BlockSizes", "DotProduct", "Mask", "Score", "merge", "product", "streaming_attention"]

# In order of preference; the reference is last because its memory is quadratic in T.
IMPLEMENTATIONS = (
    Implementation("pallas_tpu", pallas_tpu, why_not_tpu, ("tpu",)),
    Implementation("pallas_gpu", pallas_gpu, why_not_gpu, ("cuda",)),
    Implementation("blockwise", blockwise),
    Implementation("reference", reference),
)


@checked
def streaming_attention(
    score: Score,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    of_rows: tuple[jax.Array, ...] = (),
    of_cols: tuple[jax.Array, ...] = (),
    extras: tuple[jax.Array, ...] = (),
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    return_lse: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "B T H Dv"] | tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """softmax(score) v over the visible keys, in memory linear in T and S, for any elementwise score.

    Query head h reads key/value head h // G. A row without a visible key gives o = 0, lse = -inf and gradients of
    zero. Products, scores, softmax and accumulators are float32 (float64 for float64 operands).

    Args:
        score: a hashable pure function (a module's function or a frozen dataclass with `__call__`) of one head,

                score(x [Bq, Bk], rows int32 [Bq, 1], cols int32 [1, Bk], of_rows, of_cols, extras) -> [Bq, Bk]

            x are the products q.k of a block, rows the absolute positions q_offset + i, cols the key indices; of_rows
            is a tuple of [Bq, 1], of_cols of [1, Bk], extras of scalars: the values of one query head. Floats come in
            the accumulation dtype, in which the result must be. It must be elementwise in JAX's broadcasting: the value
            at (i, j) may depend on x_ij and on the numbers of row i, key j and the head only. Kernels may transpose all
            of these shapes, and spread scalars over a row. It may return -inf to hide a pair; otherwise values and
            derivatives must be finite for every pair, visible or not (an infinite derivative times the zero cotangent
            of an invisible pair is NaN). It must not close over arrays. Equal scores must be equal objects (`==`), or
            every call compiles anew.
        q: [B, T, H, D], any float dtype.
        k: [B, S, K, D], same dtype; K divides H.
        v: [B, S, K, Dv], same dtype.
        of_rows: float arrays [B, T, H], numbers of the query rows; differentiated like the operands.
        of_cols: float arrays [B, S, H], numbers of the keys for each *query* head; likewise.
        extras: float arrays [H], numbers of the query heads (slopes, exponents); likewise.
        mask: visibility; see `kernels.masks.Mask`. All its fields are honoured.
        return_lse: also return lse.
        implementation: "pallas_tpu", "pallas_gpu" (fused kernels), "blockwise" (plain JAX; memory linear in T and S as
            in those), "reference" (dense), or None for the platform's best.
        block_sizes: query and key blocks of all but the reference, chosen by default.

    Returns:
        o [B, T, H, Dv] in q's dtype; with return_lse also lse [B, T, H], float32 (float64 for float64 operands).

    Raises:
        ValueError: shapes or dtypes that do not fit, a score that is not hashable, closes over arrays or gives another
            shape or dtype, or an implementation that does not exist or cannot run here.

    Under `jax.set_mesh`, batch is split over ("data", "fsdp"), heads over "tensor" and time over "sequence", where keys
    go round in a ring; rows alone are split where a causal mask is not over one sequence. See
    `kernels.dispatch.over_mesh`.
    """
    arguments = canonicalize(score, q, k, v, of_rows, of_cols, extras, mask=mask, block_sizes=block_sizes)
    o, lse = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local),
        arguments, _layout(arguments), ("bth.", "bth"), EXCHANGES,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def _layout(arguments: Arguments) -> Arguments:
    """The axis letters of every operand, for `dispatch.over_mesh`."""
    values = arguments.values
    values = Values(("bth",) * len(values.rows), ("bsh",) * len(values.cols), ("h",) * len(values.extras))
    mask = dispatch.mask_layout(arguments.mask)
    return dataclasses.replace(arguments, q="bth.", k="bsk.", v="bsk.", values=values, mask=mask)
