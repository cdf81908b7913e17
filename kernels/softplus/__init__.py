"""Softplus attention with re-weighting (LSSA and LSSAR), and every attention phi(scores), normalised, sharpened.

Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models, arXiv 2501.13428 (v5,
equations 4 and 5). Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size of q
and k, Dv head size of v; i a query row at position a_i = q_offset + i, j a key, n_i the number of keys row i sees.
"""

import dataclasses
from typing import NamedTuple

import jax

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.forgetting.arguments import BlockSizes
from kernels.masks import Mask
from kernels.signatures import Array, Float, Num, checked
from kernels.softplus import gpu, tpu
from kernels.softplus.arguments import Arguments, Rows, canonicalize
from kernels.softplus.blockwise import blockwise
from kernels.softplus.counts import visible_counts
from kernels.softplus.reference import dense_weights, reference
from kernels.softplus.sharded import EXCHANGES

__all__ = [
    "BlockSizes",
    "Mask",
    "RowStatistics",
    "softplus_attention",
    "softplus_weights",
    "visible_counts",
]

# In order of preference; the reference is last because its memory is quadratic in T.
IMPLEMENTATIONS = (
    Implementation("pallas_tpu", tpu.attend, tpu.why_unsupported, ("tpu",)),
    Implementation("pallas_gpu", gpu.attend, gpu.why_unsupported, ("cuda",)),
    Implementation("blockwise", blockwise),
    Implementation("reference", reference),
)


class RowStatistics(NamedTuple):
    """Of every row, [B, T, H] float32 (float64), without gradient: Z = sum of a, threshold tau, M = largest a - tau.

    W = sum of ((a - tau) / M)^p over the keys above tau. M = W = 0 in degenerate rows, tau = M = W = 0 without
    re-weighting. For phi = "exp" a is relative to the row's largest score, except where normalise is not "l1" and
    power is None.
    """

    Z: jax.Array
    tau: jax.Array
    M: jax.Array
    W: jax.Array


@checked
def softplus_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    gain: float | Float[Array, " H"] | None = None,
    power: float | Float[Array, " H"] | None = None,
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    counts: float | Num[Array, "B T"] | None = None,
    phi: str = "softplus",
    phi_power: float = 1.0,
    log_count: bool = True,
    log_bias: bool = False,
    slopes: Float[Array, " H"] | None = None,
    normalise: str = "l1",
    offset: float = 1.0,
    warm_rows: int = 3,
    degenerate: str = "zero",
    degenerate_tolerance: float = 1e-6,
    return_statistics: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "B T H Dv"] | tuple[jax.Array, RowStatistics]:
    """LSSA (power=None) or LSSAR (power=15) of queries and keys which the caller has brought to unit length.

        c_i  = gain log n_i        s_ij = c_i q_i.k_j        a_ij = phi(s_ij)              (2501.13428v5, section 3)
        P_ij = a_ij / Z_i,         Z_i  = sum_j a_ij         LSSA:  o_i = sum_j P_ij v_j                (equation 4)
        R_ij = w_ij / sum_j w_ij,  w_ij = max(n_i P_ij - o_i, 0)^p    LSSAR: o_i = sum_j R_ij v_j       (equation 5)

    Sums run over the keys visible to row i. LSSAR is computed as max(a_ij - tau_i, 0)^p with the threshold
    tau_i = o_i Z_i / n_i, in units of the row's largest excess M_i: it neither overflows nor vanishes. Query head h
    reads key/value head h // G. A row without a visible key gives 0, and gradients of zero. Scores, weights, row sums
    and accumulators are float32 (float64 for float64 operands).

    Args:
        q: [B, T, H, D], any float dtype. Unit vectors in the paper; used as they are.
        k: [B, S, K, D], same dtype; K divides H.
        v: [B, S, K, Dv], same dtype.
        gain: a number or [H] (with gradient); None is log D, the paper's.
        power: p, a number or [H] (with gradient); None leaves out the re-weighting, as in LSSA.
        mask: visibility; see `kernels.masks.Mask`, of which everything is honoured.
        counts: n_i in place of the number of visible keys: a number or [B, T]; no gradient. Below 1 it counts as 1.
        phi: "softplus", "exp", "sigmoid" or "relu".
        phi_power: q of relu(s)^q, at least 1.
        log_count: False leaves log n_i out of c_i.
        log_bias: adds -log n_i to the scores.
        slopes: [H], subtracts slope |a_i - j| from the scores (ALiBi, arXiv 2108.12409); no gradient.
        normalise: stage 1 is P = a / Z ("l1"), P = a ("none") or P = a / n_i ("1/n"). Re-weighted rows are always
            divided by their sum, so there it only sets where the threshold lies.
        offset: o_i of rows with n_i > warm_rows; it is 0 in the others.
        warm_rows: see `offset`; the paper's matrix O has three rows of zeros.
        degenerate: what becomes of rows all of whose weights are equal, M_i <= degenerate_tolerance max_j a_ij (they
            have no key above the threshold): "zero" gives o_i = 0, "lssa" gives the row of stage 1.
        degenerate_tolerance: see `degenerate`.
        return_statistics: also return the row statistics.
        implementation: "pallas_tpu", "pallas_gpu" (kernels), "blockwise" (pure JAX), all of memory linear in T and S,
            "reference" (dense), or None for the platform's best.
        block_sizes: query and key blocks, by default chosen by the implementation. On a TPU multiples of 128 and 16,
            on a GPU powers of two.

    Returns:
        o [B, T, H, Dv] in q's dtype; with return_statistics also RowStatistics.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown or impossible option, or an implementation that does
            not exist or cannot run here.

    With phi="exp", normalise other than "l1" and no power, weights overflow above a score of 88 in float32. Under
    `jax.set_mesh`, batch is split over ("data", "fsdp"), heads over "tensor" and time over "sequence": keys go round in
    a ring without power (and with phi other than "exp"), else rows alone are split. See `kernels.dispatch.over_mesh`.
    """
    arguments = canonicalize(
        q, k, v, gain, power, slopes, mask=mask, counts=counts, phi=phi, phi_power=phi_power,
        log_count=log_count, log_bias=log_bias, normalise=normalise, offset=offset, warm_rows=warm_rows,
        degenerate=degenerate, tolerance=degenerate_tolerance, block_sizes=block_sizes,
    )  # fmt: skip
    o, statistics = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local),
        arguments, _layout(arguments), ("bth.", ("bth",) * 4), EXCHANGES,
    )  # fmt: skip
    return (o, RowStatistics(*jax.lax.stop_gradient(statistics))) if return_statistics else o


@checked
def softplus_weights(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    gain: float | Float[Array, " H"] | None = None,
    power: float | Float[Array, " H"] | None = None,
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    **options,
) -> tuple[jax.Array, RowStatistics]:
    """The weights P or R, [B, H, T, S] float32 (float64), and the RowStatistics of `softplus_attention`; dense.

    Options are those of `softplus_attention` but return_statistics, implementation and block_sizes.
    """
    defaults = dict(counts=None, phi="softplus", phi_power=1.0, log_count=True, log_bias=False, normalise="l1",
                    slopes=None, offset=1.0, warm_rows=3, degenerate="zero", degenerate_tolerance=1e-6)  # fmt: skip
    if unknown := options.keys() - defaults.keys():
        raise ValueError(
            f"softplus_weights has no option {', '.join(sorted(unknown))}; it has {', '.join(defaults)}"
        )
    options = defaults | options
    slopes, tolerance = options.pop("slopes"), options.pop("degenerate_tolerance")
    arguments = canonicalize(
        q, k, k, gain, power, slopes, mask=mask, tolerance=tolerance, block_sizes=None, **options
    )
    R, statistics = dense_weights(arguments)
    return R, RowStatistics(*(jax.lax.stop_gradient(x[..., 0].swapaxes(1, 2)) for x in statistics))


def _layout(arguments: Arguments) -> Arguments:
    """The axis letters of every operand, for `dispatch.over_mesh`."""
    letters = {"q": "bth.", "k": "bsk.", "v": "bsk.", "gain": "h", "power": "h", "slopes": "h"}
    return dataclasses.replace(
        dispatch.with_letters(arguments, **letters),
        mask=dispatch.mask_layout(arguments.mask),
        rows=Rows("bt", "bt", "bt", "bt"),
    )
