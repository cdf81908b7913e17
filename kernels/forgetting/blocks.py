"""The loops of blockwise forgetting attention over the blocks of one key/value head, forward and backward.

Letters: G query heads share the head; m one of nq blocks of Bq rows, n one of nk blocks of Bk keys; D, Dv head sizes.
Blocks with e_n > a0_m (last key after the block's first row) are "diagonal": only they need the causal test and the
careful decay sums. Equations (X, mu, Z, A and dS) are those of the online softmax and its gradient.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting import decay
from kernels.masks import Mask

MASKED = -1e30  # score of an invisible pair; finite, so that differences of it are not NaN
LOWEST = -1e20  # running maximum before anything was seen: exp(MASKED - LOWEST) = 0


@dataclass(frozen=True)
class Options:
    """Static choices: the factor of q.k and how decay is summed."""

    scale: float
    decay_mode: str


def forward(options: Options, mask: Mask, q, k, v, log_f, keys, starts) -> tuple[jax.Array, jax.Array]:
    """o [nq, G, Bq, Dv] in q's dtype and lse [nq, G, Bq]; keys [nq, 2] is the range of key blocks per query block."""
    score, accumulator = _scorer(options, mask, q, k, log_f, starts)
    nq, G, Bq, _ = q.shape

    def step(m, diagonal, n, carry):
        A, mu, Z = carry
        X = score(m, n, diagonal)
        higher = jnp.maximum(mu, X.max(-1))
        E, shrink = jnp.exp(X - higher[..., None]), jnp.exp(mu - higher)
        A = A * shrink[..., None] + _product(E.astype(v.dtype), v[n], accumulator)
        return A, higher, Z * shrink + E.sum(-1)

    def block(m):
        first, last = keys[m, 0], keys[m, 1]
        middle = jnp.clip((mask.q_offset + m * Bq + 1) // k.shape[1], first, last) if mask.causal else last
        carry = (jnp.zeros((G, Bq, v.shape[-1]), accumulator),
                 jnp.full((G, Bq), LOWEST, accumulator), jnp.zeros((G, Bq), accumulator))  # fmt: skip
        # Right to left: the diagonal sets the running maximum first.
        carry = _descend(middle, last, partial(step, m, True), carry) if mask.causal else carry
        A, mu, Z = _descend(first, middle, partial(step, m, False), carry)
        o = A / jnp.where(Z > 0, Z, 1)[..., None]
        return o.astype(q.dtype), jnp.where(Z > 0, mu + jnp.log(jnp.where(Z > 0, Z, 1)), -jnp.inf)

    return jax.lax.map(block, jnp.arange(nq, dtype=jnp.int32))


def backward(options: Options, mask: Mask, q, k, v, log_f, lse, delta, do, queries, starts):
    """dq, dk, dv and the column sums of dS, [G, nk Bk]; queries [nk, 2] is the range of query blocks per key block.

    lse [nq, G, Bq] is finite; delta [nq, G, Bq] is the sum of o do over Dv minus the cotangent of lse; do = 0 past T.
    """
    score, accumulator = _scorer(options, mask, q, k, log_f, starts)
    (nq, G, Bq, D), (nk, Bk, _) = q.shape, k.shape

    def step(n, diagonal, m, carry):
        dq, dk, dv, column = carry
        # Above the diagonal of a padded row the score may exceed lse; those rows carry no cotangent.
        P = jnp.exp(jnp.minimum(score(m, n, diagonal) - lse[m][..., None], 0))
        dS = P * (_product(do[m], v[n].T, accumulator) - delta[m][..., None])
        column = column + dS.sum(1)
        P, dS = P.astype(do.dtype).reshape(G * Bq, Bk), dS.astype(q.dtype).reshape(G * Bq, Bk)
        dq = dq.at[m].add(_product(dS, k[n], accumulator))
        dk = dk + _product(dS.T, q[m].reshape(G * Bq, D), accumulator)
        return dq, dk, dv + _product(P.T, do[m].reshape(G * Bq, -1), accumulator), column

    def block(dq, n):
        first, last = queries[n, 0], queries[n, 1]
        middle = jnp.clip(-((mask.q_offset + 1 - (n + 1) * Bk) // Bq), first, last) if mask.causal else first
        carry = (dq, jnp.zeros((Bk, D), accumulator), jnp.zeros((Bk, v.shape[-1]), accumulator),
                 jnp.zeros((G, Bk), accumulator))  # fmt: skip
        carry = jax.lax.fori_loop(first, middle, partial(step, n, True), carry) if mask.causal else carry
        dq, dk, dv, column = jax.lax.fori_loop(middle, last, partial(step, n, False), carry)
        return dq, (options.scale * dk, dv, column)

    dq = jnp.zeros((nq, G * Bq, D), accumulator)
    dq, (dk, dv, column) = jax.lax.scan(block, dq, jnp.arange(nk, dtype=jnp.int32))
    dq = (options.scale * dq).reshape(q.shape).astype(q.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), column.swapaxes(0, 1).reshape(G, nk * Bk)


def _scorer(options, mask, q, k, log_f, starts):
    """score(m, n, diagonal) -> X [G, Bq, Bk], the masked logits of a block; and the accumulation dtype."""
    accumulator = jnp.promote_types(jnp.float32, q.dtype)
    (nq, _, Bq, _), Bk = q.shape, k.shape[1]
    sums = log_f if log_f is None else decay.prepare(log_f, mask.q_offset, nq, Bq, Bk, options.decay_mode)
    beyond_causal = any(x is not None for x in (mask.window, mask.starts, mask.lengths, mask.q_segments))

    def score(m, n, diagonal):
        rows, cols = m * Bq + jnp.arange(Bq), n * Bk + jnp.arange(Bk)
        X = options.scale * _product(q[m], k[n].T, accumulator)
        if sums is not None:
            X = X + sums.block(m, n, mask.q_offset + rows, diagonal)
        if diagonal or beyond_causal:
            X = jnp.where(masks.visible(mask, rows, cols), X, MASKED)
        return X if starts is None else jnp.where((n >= starts[m])[:, None, None], X, MASKED)

    return score, accumulator


def _product(x, y, dtype):
    """x [..., i, j] times y [j, k], accumulated in `dtype`; leading axes are folded into one large product."""
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), y, preferred_element_type=dtype, precision="highest")
    return flat.reshape(*x.shape[:-1], -1)


def _descend(first, last, step, carry):
    """step(n, carry) for n = last - 1 down to first."""
    return jax.lax.fori_loop(0, last - first, lambda t, c: step(last - 1 - t, c), carry)
