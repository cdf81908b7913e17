"""The canonical form of a call to softplus attention: checked once here, trusted everywhere below.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size of q and k, Dv head size of v;
i a query row, n_i the keys it sees.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting.arguments import BlockSizes
from kernels.masks import Mask
from kernels.softplus.counts import visible_counts

PHI = ("softplus", "exp", "sigmoid", "relu")
NORMALISE = ("l1", "none", "1/n")
DEGENERATE = ("zero", "lssa")


def static(**options):
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass(frozen=True)
class Options:
    """The static choices of a call; `power` is None without re-weighting and "learned" if it is an array."""

    phi: str
    phi_power: float
    normalise: str
    power: float | str | None
    degenerate: str
    tolerance: float
    biased: bool = False  # Rows.bias is not 0

    @property
    def shifted(self) -> bool:
        """exp is taken relative to the row's largest score wherever a common factor of the row cancels."""
        return self.phi == "exp" and (self.normalise == "l1" or self.power is not None)

    @property
    def mean_threshold(self) -> bool:
        """The threshold of a row depends on all its visible weights."""
        return self.power is not None and self.normalise == "l1"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What depends on n_i alone, [B, T] in the accumulation dtype, without gradient.

    factor: of the gain in c_i (log n_i or 1); bias: added to every score of the row; threshold: tau_i, or
    tau_i / Z_i for normalise="l1"; share: the weight of a in stage 1 (1 / n_i or 1) unless normalise="l1".
    """

    factor: jax.Array
    bias: jax.Array
    threshold: jax.Array
    share: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """What every implementation receives.

    q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] of one float dtype; gain [H], power [H] or None and slopes [H] or
    None in the accumulation dtype; lengths in `mask` are [B].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gain: jax.Array
    power: jax.Array | None
    slopes: jax.Array | None
    rows: Rows
    mask: Mask
    options: Options = static()
    block_sizes: BlockSizes | None = static()  # None: each implementation takes its own

    @property
    def accumulator(self) -> jnp.dtype:
        """float32, or float64 for float64 operands: scores, weights, row sums and accumulators."""
        return jnp.promote_types(jnp.float32, self.q.dtype)


def canonicalize(
    q, k, v, gain, power, slopes, *, mask, counts, phi, phi_power, log_count, log_bias, normalise, offset,
    warm_rows, degenerate, tolerance, block_sizes,
) -> Arguments:  # fmt: skip
    """Checks a call and brings it into the one form the implementations share; see the public docstring for errors."""
    (B, T, H, D), S = q.shape, k.shape[1]
    check_operands(q, k, v)
    _check_options(phi, phi_power, normalise, power, offset, degenerate, tolerance)
    mask = masks.validate(mask, B, T, S)
    wide = jnp.promote_types(jnp.float32, q.dtype)
    gain = jnp.broadcast_to(jnp.asarray(math.log(D) if gain is None else gain, wide), (H,))
    learned = isinstance(power, jax.Array)
    power_option = "learned" if learned else power
    options = Options(
        phi, float(phi_power), normalise, power_option, degenerate, float(tolerance), biased=log_bias
    )
    n = jnp.broadcast_to(visible_counts(mask, T, S) if counts is None else counts, (B, T))
    rows = _rows(n.astype(wide), log_count, log_bias, normalise, offset, warm_rows)
    return Arguments(
        q, k, v, gain, power.astype(wide) if learned else None,
        None if slopes is None else jax.lax.stop_gradient(slopes.astype(wide)), rows, mask, options,
        block_sizes,
    )  # fmt: skip


def _rows(n, log_count, log_bias, normalise, offset, warm_rows) -> Rows:
    """The row vectors of counts n [B, T]; a row that sees nothing is treated as n = 1, and its weights are masked."""
    some = jnp.maximum(jax.lax.stop_gradient(n), 1)
    subtracted = jnp.where(some > warm_rows, jnp.asarray(offset, n.dtype), 0)  # o_i
    log_n, one = jnp.log(some), jnp.ones_like(some)
    return Rows(
        factor=log_n if log_count else one,
        bias=-log_n if log_bias else 0 * one,
        threshold=subtracted if normalise == "1/n" else subtracted / some,
        share=1 / some if normalise == "1/n" else one,
    )


def check_operands(q, k, v) -> None:
    """ValueError unless q, k, v share a float dtype, K divides H and no dimension is empty."""
    H, K = q.shape[2], k.shape[2]
    if H % max(K, 1):
        raise ValueError(f"{H=} query heads must be a multiple of the {K=} key/value heads")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(
            f"empty operands q {q.shape}, k {k.shape}, v {v.shape}: every dimension must be at least 1"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share one float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")


def _check_options(phi, phi_power, normalise, power, offset, degenerate, tolerance) -> None:
    for name, value, allowed in (
        ("phi", phi, PHI),
        ("normalise", normalise, NORMALISE),
        ("degenerate", degenerate, DEGENERATE),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")
    if phi_power != 1 and phi != "relu":
        raise ValueError(f"phi_power={phi_power} belongs to phi='relu', got {phi=}; leave it at 1")
    if phi_power < 1:
        raise ValueError(f"phi_power={phi_power} must be at least 1, or the slope at 0 is infinite")
    if isinstance(power, (int, float)) and power <= 0:
        raise ValueError(f"power={power} must be positive; use None for no re-weighting")
    if offset < 0:
        raise ValueError(f"offset={offset} must not be negative: masked keys must stay below the threshold")
    if not 0 <= tolerance < 1:
        raise ValueError(f"degenerate_tolerance={tolerance} must lie in [0, 1)")
