"""Row-normalised attention for any score that is a small pure function of a block, streamed over the keys.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size of q and k, Dv head size
of v; i a query row at position a_i = q_offset + i, j a key.

    s_ij = score(q_i, k_j, a_i, j, extras)        o_i = sum_j softmax_j(s_ij) v_j        lse_i = log sum_j exp(s_ij)

Both sums run over the keys visible to row i. A paper writes its score once, for a block of queries and keys; the
softmax, the masks and the gradient (`jax.vjp` of the score, block by block) are here.
"""

import dataclasses

import jax

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.forgetting.arguments import BlockSizes
from kernels.masks import Mask
from kernels.signatures import Array, Float, checked
from kernels.streaming.arguments import Arguments, Score, canonicalize
from kernels.streaming.blockwise import blockwise
from kernels.streaming.merge import merge
from kernels.streaming.reference import reference
from kernels.streaming.scores import DotProduct, product

__all__ = ["BlockSizes", "DotProduct", "Mask", "Score", "merge", "product", "streaming_attention"]

# In order of preference; the reference is last because its memory is quadratic in T.
IMPLEMENTATIONS = (Implementation("blockwise", blockwise), Implementation("reference", reference))


@checked
def streaming_attention(
    score: Score,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K Dk"],
    v: Float[Array, "B S K Dv"],
    extras: tuple[jax.Array, ...] = (),
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    return_lse: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "B T H Dv"] | tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """softmax(score) v over the visible keys, in memory linear in T and S, for any block-wise score.

    Query head h reads key/value head h // G. A row without a visible key gives o = 0, lse = -inf and gradients of
    zero. Scores, softmax and accumulators are float32 (float64 for float64 operands).

    Args:
        score: a hashable pure function (a module's function or a frozen dataclass with `__call__`) of one head,

                score(q [Bq, D], k [Bk, Dk], rows int32 [Bq], cols int32 [Bk], *extras of the head) -> [Bq, Bk]

            q, k (with the operands' values) and extras come in the accumulation dtype, in which the result must be;
            rows are the absolute positions q_offset + i, cols the key indices. It must treat pairs independently:
            the value at (i, j) may depend on row i, key j and extras only. It may return -inf to hide a pair;
            otherwise values and derivatives must be finite for every pair, visible or not (an infinite derivative
            times the zero cotangent of an invisible pair is NaN). Equal scores must be equal objects (`==`), or
            every call compiles anew.
        q: [B, T, H, D], any float dtype.
        k: [B, S, K, Dk], same dtype; K divides H. Dk may differ from D if the score can use it.
        v: [B, S, K, Dv], same dtype.
        extras: float arrays with leading axis H, one slice a query head, differentiated like the operands. Their
            gradient is accumulated in every block, so they should be small beside q (slopes, exponents, biases).
        mask: visibility; see `kernels.masks.Mask`. All its fields are honoured.
        return_lse: also return lse.
        implementation: "blockwise" (memory linear in T and S), "reference" (dense), or None for the platform's best.
        block_sizes: query and key blocks of "blockwise", chosen from T and S by default.

    Returns:
        o [B, T, H, Dv] in q's dtype; with return_lse also lse [B, T, H], float32 (float64 for float64 operands).

    Raises:
        ValueError: shapes or dtypes that do not fit, a score that is not hashable or gives another shape or dtype,
            or an implementation that does not exist or cannot run here.

    Under `jax.set_mesh`, batch is split over ("data", "fsdp") and heads over "tensor"; the sequence stays whole; see
    `kernels.dispatch.over_mesh`.
    """
    arguments = canonicalize(score, q, k, v, extras, mask=mask, block_sizes=block_sizes)
    o, lse = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local),
        arguments, _layout(arguments), ("b.h.", "b.h"),
    )  # fmt: skip
    return (o, lse) if return_lse else o


def _layout(arguments: Arguments) -> Arguments:
    """The axis letters of every operand, for `dispatch.over_mesh`."""
    extras = tuple("h" + "." * (each.ndim - 1) for each in arguments.extras)
    mask = dispatch.mask_layout(arguments.mask)
    return dataclasses.replace(arguments, q="b.h.", k="b.k.", v="b.k.", extras=extras, mask=mask)
