"""One tile of scores in the Pallas kernels: the arithmetic of both machines, in either orientation.

Letters: i a query row, j a key; X the tile, with keys along `axis`. Row vectors come by name in a dictionary and have
length 1 along `axis`, so that they broadcast. A name that is absent costs nothing: its term is not compiled in.

    c, bias, slope, position   s_ij = c_i q_i.k_j + bias_i - slope |position_i - j|
    first, last, segment       j is visible iff first_i <= j <= last_i and its segment is segment_i
    power                      p, if it is learned
    share                      weight of a in rows that are not re-weighted: R = share a
    tau, per_M, per_W, lift    R = r^p per_W, r = max(a - tau, 0) per_M, dR/da = lift r^(p-1) with lift = p / (M W)
    delta, drift               <do_i, o_i>, and t_i G_i: what every visible key of the row adds to the threshold
"""

import jax
import jax.numpy as jnp

from kernels.softplus.arguments import Options
from kernels.softplus.weights import LOWEST, MASKED, phi, real_power, threshold

Rows = dict[str, jax.Array]


def scores(rows: Rows, dot: jax.Array, keys: jax.Array, at, segments) -> tuple[jax.Array, jax.Array]:
    """s and visibility of a tile; its keys are `at` + keys (int32, like X), of `segments` (or None)."""
    s = rows["c"] * dot
    if "bias" in rows:
        s = s + rows["bias"]
    if "slope" in rows:
        s = s - rows["slope"] * jnp.abs(rows["position"] - at - keys).astype(s.dtype)
    seen = keys <= rows["last"] - at
    if "first" in rows:
        seen &= keys >= rows["first"] - at
    if segments is not None:
        seen &= rows["segment"] == segments
    return s, seen


def start(options: Options) -> float:
    """The running maximum of `first_sums` before anything was seen."""
    return LOWEST if options.shifted else 0.0


def first_sums(options: Options, s, seen, Z, top, axis):
    """(a, Z, top, shrink) after one more tile; a shifted exp is relative to `top`, earlier sums have to shrink."""
    if options.shifted:
        s = jnp.where(seen, s, MASKED)
        higher = jnp.maximum(top, s.max(axis, keepdims=True))
        a, shrink = jnp.exp(s - higher), jnp.exp(top - higher)
        return a, Z * shrink + a.sum(axis, keepdims=True), higher, shrink
    a = jnp.where(seen, phi(options, s)[0], 0)
    return a, Z + a.sum(axis, keepdims=True), jnp.maximum(top, a.max(axis, keepdims=True)), None


def between(options: Options, rows: Rows, Z, top):
    """(tau, M, shift) of rows whose first sweep ended with the sum Z and the maximum `top`."""
    shift, amax = jnp.zeros_like(Z), top
    if options.shifted:
        shift, amax = jnp.where(Z > 0, top, 0), (Z > 0).astype(Z.dtype)
    return (*threshold(options, rows["threshold"], Z, amax, shift), shift)


def excess(options: Options, rows: Rows, a, tau, per_M):
    """w = r^p of a tile of a."""
    return real_power(jnp.maximum(a - tau, 0) * per_M, exponent(options, rows))


def exponent(options: Options, rows: Rows):
    return rows["power"] if options.power == "learned" else options.power


def gradients(options: Options, rows: Rows, s, seen, dR):
    """(R, dL/da at a fixed threshold, the part of it that moves the threshold, phi'(s), the rows' shares of dp).

    The bias of `rows` includes -shift. Both derivatives and R are 0 at invisible pairs, except dL/da, which phi'
    multiplies. Without a threshold the third is None, and without a learned power so is the last.
    """
    a, slope = phi(options, s)
    a, slope = jnp.where(seen, a, 0), jnp.where(seen, slope, 0)
    centred = dR - rows["delta"]
    plain = centred if options.normalise == "l1" else dR
    if options.power is None:
        return a * rows["share"], rows["share"] * plain, None, slope, None
    p = exponent(options, rows)
    r = jnp.maximum(a - rows["tau"], 0) * rows["per_M"]
    steep = real_power(r, p - 1)  # 0 below the threshold, also for p = 1
    R, moving = r * steep * rows["per_W"], steep * (centred * rows["lift"])
    dp = R * jnp.log(jnp.where(r > 0, r, 1)) * centred if options.power == "learned" else None
    if options.degenerate == "lssa":  # share is 0 in sharp rows, per_M is 0 in the others
        return R + a * rows["share"], moving + rows["share"] * plain, moving, slope, dp
    return R, moving, moving, slope, dp
