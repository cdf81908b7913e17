"""The loops of blockwise streaming attention over the blocks of one key/value head, forward and backward.

Letters: G query heads share the head; m one of nq blocks of Bq rows, n one of nk blocks of Bk keys; D, Dk, Dv head
sizes. Equations (X, mu, Z, A and dS) are those of the online softmax and its gradient; the gradient of X itself is
`jax.vjp` of the score of the block, recomputed from q and k.
"""

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.masks import Mask

MASKED = -1e30  # score of an invisible pair; finite, so that differences of it are not NaN
LOWEST = -1e20  # running maximum before anything was seen: exp(MASKED - LOWEST) = 0


def forward(score, mask: Mask, q, k, v, extras, keys) -> tuple[jax.Array, jax.Array]:
    """o [nq, G, Bq, Dv] in q's dtype and lse [nq, G, Bq]; keys [nq, 2] is the range of key blocks per query block."""
    (nq, G, Bq, _), Dv = q.shape, v.shape[-1]
    block, accumulator = _scorer(score, mask, q, k)

    def row_block(m):
        def step(t, carry):
            A, mu, Z = carry
            n = keys[m, 1] - 1 - t  # right to left: the diagonal sets the running maximum first
            X, seen = block(m, n, q[m], k[n], extras), masks.visible(mask, *_indices(m, n, Bq, k.shape[1]))
            X = jnp.where(seen, X, MASKED)
            higher = jnp.maximum(mu, X.max(-1))
            E, shrink = jnp.exp(X - higher[..., None]), jnp.exp(mu - higher)
            A = A * shrink[..., None] + _product(E.astype(v.dtype), v[n], accumulator)
            return A, higher, Z * shrink + E.sum(-1)

        start = jnp.zeros((G, Bq, Dv), accumulator), jnp.full((G, Bq), LOWEST, accumulator)
        A, mu, Z = jax.lax.fori_loop(0, keys[m, 1] - keys[m, 0], step, (*start, jnp.zeros_like(start[1])))
        some = jnp.where(Z > 0, Z, 1)
        return (A / some[..., None]).astype(q.dtype), jnp.where(Z > 0, mu + jnp.log(some), -jnp.inf)

    return jax.lax.map(row_block, jnp.arange(nq, dtype=jnp.int32))


def backward(score, mask: Mask, q, k, v, extras, lse, delta, do, queries):
    """dq, dk, dv in the operands' dtypes and dextras; queries [nk, 2] is the range of query blocks per key block.

    lse [nq, G, Bq] is finite; delta [nq, G, Bq] is the sum of o do over Dv minus the cotangent of lse; do = 0 past T.
    """
    (G, Bq), (nk, Bk, Dk), Dv = q.shape[1:3], k.shape, v.shape[-1]
    block, accumulator = _scorer(score, mask, q, k)

    def key_block(carry, n):
        def step(m, carry):
            dq, dk, dv, dextras = carry
            wide = q[m].astype(accumulator), k[n].astype(accumulator), extras
            X, pull = jax.vjp(lambda *operands: block(m, n, *operands), *wide)
            X = jnp.where(masks.visible(mask, *_indices(m, n, Bq, Bk)), X, MASKED)
            # In padded rows the score may exceed lse; those rows carry no cotangent.
            P = jnp.exp(jnp.minimum(X - lse[m][..., None], 0))
            dS = P * (_product(do[m], v[n].T, accumulator) - delta[m][..., None])
            of_q, of_k, of_extras = pull(dS)
            P = P.astype(do.dtype).reshape(G * Bq, Bk)
            dv = dv + _product(P.T, do[m].reshape(G * Bq, Dv), accumulator)
            return dq.at[m].add(of_q), dk + of_k, dv, jax.tree.map(jnp.add, dextras, of_extras)

        dq, dextras = carry
        start = dq, jnp.zeros((Bk, Dk), accumulator), jnp.zeros((Bk, Dv), accumulator), dextras
        dq, dk, dv, dextras = jax.lax.fori_loop(queries[n, 0], queries[n, 1], step, start)
        return (dq, dextras), (dk.astype(k.dtype), dv.astype(v.dtype))

    start = jnp.zeros(q.shape, accumulator), jax.tree.map(jnp.zeros_like, extras)
    (dq, dextras), (dk, dv) = jax.lax.scan(key_block, start, jnp.arange(nk, dtype=jnp.int32))
    return dq.astype(q.dtype), dk, dv, dextras


def _scorer(score, mask, q, k):
    """block(m, n, q [G, Bq, D], k [Bk, Dk], extras [G, ...]) -> X [G, Bq, Bk]; and the accumulation dtype."""
    accumulator = jnp.promote_types(jnp.float32, q.dtype)

    def block(m, n, of_q, of_k, extras):
        rows, cols = _indices(m, n, q.shape[2], k.shape[1])

        def of_head(of_q, of_k, extras):
            return score(of_q, of_k, mask.q_offset + rows, cols, *extras)

        in_axes = (0, None, 0)
        return jax.vmap(of_head, in_axes)(of_q.astype(accumulator), of_k.astype(accumulator), extras)

    return block, accumulator


def _indices(m, n, Bq, Bk):
    """Row and key indices of a block, int32 [Bq] and [Bk]."""
    return m * Bq + jnp.arange(Bq, dtype=jnp.int32), n * Bk + jnp.arange(Bk, dtype=jnp.int32)


def _product(x, y, dtype):
    """x [..., i, j] times y [j, k], accumulated in `dtype`; leading axes are folded into one large product."""
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), y, preferred_element_type=dtype, precision="highest")
    return flat.reshape(*x.shape[:-1], -1)
