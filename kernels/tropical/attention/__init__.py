"""Tropical attention: scores by a projective metric, values combined by a maximum (arXiv 2505.17190).

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size of q and k, Dv of v;
i a query row at position a_i = q_offset + i, j a key, d a channel; c context, o output.
"""

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.masks import Mask
from kernels.signatures import Array, Float, checked
from kernels.tropical.attention.arguments import SCORES, BlockSizes, canonicalize, layout
from kernels.tropical.attention.blockwise import blockwise
from kernels.tropical.attention.combine import combine_contexts, shift_winners
from kernels.tropical.attention.gpu import pallas_gpu
from kernels.tropical.attention.gpu import why_unsupported as why_not_gpu
from kernels.tropical.attention.reference import reference, scores
from kernels.tropical.attention.sharded import EXCHANGES
from kernels.tropical.attention.tpu import pallas_tpu
from kernels.tropical.attention.tpu import why_unsupported as why_not_tpu

__all__ = [
    "SCORES",
    "BlockSizes",
    "combine_contexts",
    "shift_winners",
    "devalue",
    "tropical_attention",
    "tropical_scores",
]

# In order of preference; the reference is last because it holds T x S x D.
IMPLEMENTATIONS = (
    Implementation("pallas_tpu", pallas_tpu, why_not_tpu, ("tpu",)),
    Implementation("pallas_gpu", pallas_gpu, why_not_gpu, ("cuda",)),
    Implementation("blockwise", blockwise),
    Implementation("reference", reference),
)
DEVALUATIONS = {"expm1": jnp.expm1, "exp": jnp.exp, "none": lambda c: c}


@checked
def tropical_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    score: str = "hilbert",
    mask: Mask = Mask(causal=False),  # noqa: B008 (frozen)
    bias: Float[Array, "_ _ _ _"] | None = None,
    slopes: Float[Array, " H"] | None = None,
    score_scale: float = 1.0,
    smooth_beta: float | jax.Array | None = None,
    context_clip: float | None = None,
    devaluation: str = "expm1",
    return_context: bool = False,
    return_winners: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "B T H Dv"] | tuple[jax.Array, ...]:
    """Each channel of a row takes the value of the key with the largest sum of score and value (section 2.2).

        S_ij = score_scale score(q_i, k_j) - slope (a_i - j) + bias_ij         -inf where key j is invisible
        c_id = max_j (S_ij + v_jd),      o = expm1(c)                          o = 0 where no key is visible

        hilbert       -(max_d - min_d) of q_id - k_jd          hilbert_asym   -sum_d (q_id - k_jd - min_d')
        maxplus_dot   max_d (q_id + k_jd)                      lse_dot        log sum exp_d, and so over the keys

    The lowest index wins ties, of keys and of channels, and gradients go to winners alone. Query head h reads
    key/value head h // G. All arithmetic before the last cast is float32 (float64 for float64 operands); operands
    are finite, except that v and bias may be -inf.

    Args:
        q: [B, T, H, D], any float dtype.
        k: [B, S, K, D]; K divides H.
        v: [B, S, K, Dv].
        score: one of the four above.
        mask: visibility, all keys by default; see `kernels.masks.Mask`.
        bias: [B or 1, H or 1, T or 1, S or 1], added to the scores; -inf hides a key.
        slopes: [H], loss of score per position of distance; needs a causal mask.
        score_scale: factor of the raw score; the paper has none.
        smooth_beta: replace each max by (1 / beta) log sum exp(beta .) and each min by its mirror; None: hard.
        context_clip: upper bound of c before devaluation (expm1 leaves float32 at 88.7); None: none.
        devaluation: "expm1", "exp" or "none" (o = c).
        return_context: also return c.
        return_winners: also return the winning keys; hard scores only.
        implementation: "pallas_tpu", "pallas_gpu" (kernels for hard maxima in float32), "blockwise" (memory linear in
            T and S), "reference" (dense), or None for the best.
        block_sizes: blocks of queries and keys; they change no bit of a hard result. Kernels round them up to whole
            registers.

    Returns:
        o [B, T, H, Dv] in q's dtype; then, if asked for, c [B, T, H, Dv] float32 (float64), -inf where no key is
        visible, and the winners int32 [B, T, H, Dv], -1 there.

    Raises:
        ValueError: shapes that do not fit, an unknown score or devaluation, options that exclude each other, or an
            implementation that does not exist.

    Under `jax.set_mesh`, batch is split over ("data", "fsdp"), heads over "tensor" and time over "sequence", where keys
    go round in a ring; rows alone are split for smooth maxima, and where a causal mask is not over one sequence. See
    `kernels.dispatch.over_mesh`.
    """
    if devaluation not in DEVALUATIONS:
        raise ValueError(f"{devaluation=} is unknown; choose one of {tuple(DEVALUATIONS)}")
    if return_winners and (smooth_beta is not None or score == "lse_dot"):
        raise ValueError(f"a smooth maximum has no winners ({score=}, {smooth_beta=}); drop return_winners")
    if slopes is not None and not mask.causal:
        raise ValueError("slopes count positions back from the query; give a causal mask or a bias instead")
    arguments = canonicalize(
        q, k, v, score=score, mask=mask, bias=bias, slopes=slopes, score_scale=score_scale,
        smooth_beta=smooth_beta, block_sizes=block_sizes,
    )  # fmt: skip
    c, winners = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local),
        arguments, layout(arguments), ("bth.", "bth."), EXCHANGES,
    )  # fmt: skip
    o = devalue(c, devaluation, context_clip).astype(q.dtype)
    rest = (c,) * return_context + (winners,) * return_winners
    return (o, *rest) if rest else o


@checked
def tropical_scores(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    *,
    score: str = "hilbert",
    score_scale: float = 1.0,
    smooth_beta: float | jax.Array | None = None,
) -> Float[Array, "B H T S"]:
    """The scores of `tropical_attention` alone, without mask, slope and bias: dense, for inspection and losses on them.

    Same operands and options; float32 (float64 for float64 operands); ValueError for the same reasons.
    """
    arguments = canonicalize(
        q, k, k, score=score, mask=Mask(causal=False), bias=None, slopes=None, score_scale=score_scale,
        smooth_beta=smooth_beta, block_sizes=None,
    )  # fmt: skip
    return scores(arguments)


def devalue(c: jax.Array, devaluation: str, context_clip: float | None) -> jax.Array:
    """Back from log space: c clipped from above, then expm1, exp or nothing; 0 where c = -inf. Any shape."""
    empty = c == -jnp.inf
    c = jnp.where(empty, 0, c)
    if context_clip is not None:
        c = jnp.minimum(c, context_clip)
    return jnp.where(empty, 0, DEVALUATIONS[devaluation](c))
