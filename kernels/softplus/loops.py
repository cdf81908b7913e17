"""The loops of blockwise softplus attention over the blocks of one key/value head, forward and backward.

Letters: G query heads share the head; m one of nq blocks of Bq rows, n one of nk blocks of Bk keys; D, Dv head sizes;
X [G, Bq, Bk] of a block: s scores, a = phi(s), r excess over the threshold in units of the largest, w = r^p,
R = w / W the weights, dR = do v. Vectors of rows (Z, tau, M, W, shift and those of `Rows`) are [nq, G, Bq] or [nq, Bq].

    forward    stage 1: o = sum a v / sum a, one sweep.     Stage 2: Z and max a in one sweep, then o = sum w v / W.
    backward   G_i  = sum_j du_ij,   du_ij = p r^(p-1) (dR_ij - <do_i, o_i>) / (M_i W_i)       a sweep of its own
               ds_ij = (du_ij - t_i G_i) phi'(s_ij): every visible key moves the threshold t_i Z_i
               dq_i = c_i sum_j ds_ij k_j    dk_j = sum_i c_i ds_ij q_i    dv_j = sum_i R_ij do_i
               dgain = sum_i factor_i <q_i, sum_j ds_ij k_j>     dp = sum_ij R_ij log r_ij (dR_ij - <do_i, o_i>)
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.masks import Mask
from kernels.softplus.arguments import Options, Rows
from kernels.softplus.weights import LOWEST, MASKED, phi, real_power, reciprocal, threshold


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """Row vectors [nq, G, Bq] that the forward pass leaves to the backward pass; shift is 0 unless phi is exp."""

    Z: jax.Array
    tau: jax.Array
    M: jax.Array
    W: jax.Array
    shift: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """One key/value head: q [nq, G, Bq, D], k [nk, Bk, D], v [nk, Bk, Dv], rows [nq, Bq]; gain, power, slopes [G]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gain: jax.Array
    power: jax.Array | None
    slopes: jax.Array | None
    rows: Rows
    mask: Mask

    @property
    def accumulator(self):
        return jnp.promote_types(jnp.float32, self.q.dtype)

    def scores(self, m, n) -> tuple[jax.Array, jax.Array]:
        """s [G, Bq, Bk], MASKED where invisible, and visibility [1, Bq, Bk] of query block m and key block n."""
        Bq, Bk = self.q.shape[2], self.k.shape[1]
        rows, cols = m * Bq + jnp.arange(Bq), n * Bk + jnp.arange(Bk)
        # c_i multiplies the float32 product, not q: in bfloat16 that keeps its digits.
        s = self.c(m)[..., None] * _product(self.q[m], self.k[n].T, self.accumulator)
        s = s + self.rows.bias[m][:, None]
        if self.slopes is not None:
            s = s - self.slopes[:, None, None] * jnp.abs((self.mask.q_offset + rows)[:, None] - cols)
        seen = masks.visible(self.mask, rows, cols)
        return jnp.where(seen, s, MASKED), seen

    def c(self, m) -> jax.Array:
        """c_i of query block m, [G, Bq]."""
        return self.gain[:, None] * self.rows.factor[m]

    def exponent(self, options: Options):
        """p: a Python number, or an array [G, 1, 1]."""
        return options.power if self.power is None else self.power[:, None, None]


def forward(options: Options, head: Head, keys) -> tuple[jax.Array, Statistics]:
    """o [nq, G, Bq, Dv] in q's dtype and the statistics; keys [nq, 2] is the range of key blocks per query block."""
    nq = head.q.shape[0]

    def block(m):
        if options.power is None:
            acc, Z, top = _first_sweep(options, head, keys, m, with_values=True)
            shift = jnp.where(Z > 0, top, 0) if options.shifted else jnp.zeros_like(Z)
            nothing = jnp.zeros_like(Z)
            f = _share(options, head.rows.share[m], Z)
            return (acc * f[..., None]).astype(head.q.dtype), Statistics(Z, nothing, nothing, nothing, shift)
        _, Z, top = _first_sweep(options, head, keys, m, with_values=False)
        shift, amax = jnp.zeros_like(Z), top
        if options.shifted:
            shift, amax = jnp.where(Z > 0, top, 0), (Z > 0).astype(Z.dtype)
        tau, M = threshold(options, head.rows.threshold[m], Z, amax, shift)
        acc, W = _second_sweep(options, head, keys, m, tau, M, shift)
        f = _divisor(options, head.rows.share[m], Z, M, W)
        return (acc * f[..., None]).astype(head.q.dtype), Statistics(Z, tau, M, W, shift)

    return jax.lax.map(block, jnp.arange(nq, dtype=jnp.int32))


def _first_sweep(options, head, keys, m, *, with_values):
    """(sum a v or None, sum a, max a) of query block m; for a shifted exp, a is relative to the largest score."""
    (_, G, Bq, _), Dv, wide = head.q.shape, head.v.shape[-1], head.accumulator

    def step(n, carry):
        acc, Z, top = carry
        s, seen = head.scores(m, n)
        if options.shifted:
            higher = jnp.maximum(top, s.max(-1))
            a, shrink = jnp.exp(s - higher[..., None]), jnp.exp(top - higher)
            Z, acc = Z * shrink, acc * shrink[..., None] if with_values else acc
        else:
            a = jnp.where(seen, phi(options, s)[0], 0)
            higher = jnp.maximum(top, a.max(-1))
        if with_values:
            acc = acc + _product(a.astype(head.v.dtype), head.v[n], wide)
        return acc, Z + a.sum(-1), higher

    acc = jnp.zeros((G, Bq, Dv), wide) if with_values else None
    start = jnp.full((G, Bq), LOWEST if options.shifted else 0, wide)
    return jax.lax.fori_loop(keys[m, 0], keys[m, 1], step, (acc, jnp.zeros((G, Bq), wide), start))


def _second_sweep(options, head, keys, m, tau, M, shift):
    """(sum w v, sum w) of query block m; rows without re-weighting take w = a in the first sum."""
    (_, G, Bq, _), Dv, wide = head.q.shape, head.v.shape[-1], head.accumulator
    per_M, sharp = reciprocal(M)[..., None], (M > 0)[..., None]

    def step(n, carry):
        acc, W = carry
        s, seen = head.scores(m, n)
        a = jnp.where(seen, phi(options, s - shift[..., None])[0], 0)
        w = real_power(jnp.maximum(a - tau[..., None], 0) * per_M, head.exponent(options))
        used = jnp.where(sharp, w, a) if options.degenerate == "lssa" else w
        return acc + _product(used.astype(head.v.dtype), head.v[n], wide), W + w.sum(-1)

    carry = (jnp.zeros((G, Bq, Dv), wide), jnp.zeros((G, Bq), wide))
    return jax.lax.fori_loop(keys[m, 0], keys[m, 1], step, carry)


def _share(options, share, Z):
    """What multiplies a in a row that is not re-weighted, [G, Bq]."""
    return reciprocal(Z) if options.normalise == "l1" else jnp.broadcast_to(share, Z.shape)


def _divisor(options, share, Z, M, W):
    """What multiplies w (or a, in a degenerate row that keeps stage 1) to give the weight, [G, Bq]."""
    f = reciprocal(W)
    return jnp.where(M > 0, f, _share(options, share, Z)) if options.degenerate == "lssa" else f


def backward(options: Options, head: Head, statistics: Statistics, delta, do, keys, queries):
    """(dq, dk, dv, dgain [G], dpower [G] or None); delta [nq, G, Bq] = <do, o>; do = 0 past the last row.

    queries [nk, 2] is the range of query blocks per key block, keys [nq, 2] the converse.
    """
    (nq, G, Bq, D), (nk, Bk, Dv), wide = head.q.shape, head.v.shape, head.accumulator
    gradient = partial(_of_weights, options, head, statistics, delta, do)
    drift = jnp.zeros_like(delta)  # t_i G_i
    if options.mean_threshold:
        drift = head.rows.threshold[:, None] * _row_sums(gradient, keys, delta)

    def step(n, m, carry):
        dq, dk, dv, dp = carry
        R, da, slope, seen, dp_block = gradient(m, n)
        dp = dp if dp is None else dp.at[m].add(dp_block)
        ds = jnp.where(seen, (da - drift[m][..., None]) * slope, 0)
        R = R.astype(do.dtype).reshape(G * Bq, Bk)
        dv = dv + _product(R.T, do[m].reshape(G * Bq, Dv), wide)
        dq = dq.at[m].add(_product(ds.astype(head.q.dtype), head.k[n], wide))
        ds = (ds * head.c(m)[..., None]).astype(head.q.dtype).reshape(G * Bq, Bk)
        return dq, dk + _product(ds.T, head.q[m].reshape(G * Bq, D), wide), dv, dp

    def block(carry, n):
        dk, dv = jnp.zeros((Bk, D), wide), jnp.zeros((Bk, Dv), wide)
        dq, dk, dv, dp = jax.lax.fori_loop(
            queries[n, 0], queries[n, 1], partial(step, n), (carry[0], dk, dv, carry[1])
        )
        return (dq, dp), (dk, dv)

    dp = None if head.power is None else jnp.zeros_like(delta)
    (E, dp), (dk, dv) = jax.lax.scan(
        block, (jnp.zeros((nq, G, Bq, D), wide), dp), jnp.arange(nk, dtype=jnp.int32)
    )
    factor = head.rows.factor[:, None]
    dgain = (factor * (E * head.q.astype(wide)).sum(-1)).sum((0, 2))
    dq = (head.gain[:, None] * factor)[..., None] * E
    dp = None if dp is None else dp.sum((0, 2))
    return dq.astype(head.q.dtype), dk.astype(head.k.dtype), dv.astype(head.v.dtype), dgain, dp


def _row_sums(gradient, keys, like):
    """G_i, the sum of du over the keys of every row, [nq, G, Bq]."""

    def block(m):
        zero = jnp.zeros(like.shape[1:], like.dtype)
        # Rows without re-weighting have no threshold to move.
        return jax.lax.fori_loop(
            keys[m, 0], keys[m, 1], lambda n, G: G + gradient(m, n, sharp_only=True)[1].sum(-1), zero
        )

    return jax.lax.map(block, jnp.arange(like.shape[0], dtype=jnp.int32))


def _of_weights(options, head, statistics, delta, do, m, n, sharp_only=False):
    """Of one block: R, dL/da with the threshold held fixed, phi'(s), visibility, and the rows' shares of dp or None."""
    s, seen = head.scores(m, n)
    a, slope = phi(options, s - statistics.shift[m][..., None])
    a = jnp.where(seen, a, 0)
    dR = _product(do[m], head.v[n].T, head.accumulator)
    centred = dR - delta[m][..., None]
    Z, tau, M, W = (getattr(statistics, name)[m] for name in ("Z", "tau", "M", "W"))
    share = _share(options, head.rows.share[m], Z)[..., None]
    plain = (a * share, jnp.where(seen, share * (centred if options.normalise == "l1" else dR), 0))
    if options.power is None:
        return *plain, slope, seen, None
    p, per_M, per_W = head.exponent(options), reciprocal(M)[..., None], reciprocal(W)[..., None]
    r = jnp.maximum(a - tau[..., None], 0) * per_M
    steep = real_power(r, p - 1)  # 0 below the threshold, also for p = 1
    R, da = r * steep * per_W, p * per_M * per_W * steep * centred
    dp = None if head.power is None else (R * jnp.log(jnp.where(r > 0, r, 1)) * centred).sum(-1)
    if options.degenerate == "lssa" and not sharp_only:
        R, da = (jnp.where((M > 0)[..., None], x, y) for x, y in zip((R, da), plain, strict=True))
    return R, da, slope, seen, dp


def _product(x, y, dtype):
    """x [..., i, j] times y [j, k], accumulated in `dtype`; leading axes are folded into one large product."""
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), y, preferred_element_type=dtype, precision="highest")
    return flat.reshape(*x.shape[:-1], -1)
