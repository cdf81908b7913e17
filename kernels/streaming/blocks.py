"""The loops of blockwise streaming attention over the blocks of one key/value head, forward and backward.

Letters: G query heads share the head; m one of nq blocks of Bq rows, n one of nk blocks of Bk keys; D, Dv head sizes.
Equations (X, mu, Z, A and dS) are those of the online softmax and its gradient; the gradient of the score by itself is
`jax.vjp` of the score of the block, recomputed from the products x = q k^T.
"""

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.masks import Mask
from kernels.streaming.arguments import Values

MASKED = -1e30  # score of an invisible pair; finite, so that differences of it are not NaN
LOWEST = -1e20  # running maximum before anything was seen: exp(MASKED - LOWEST) = 0


def forward(score, mask: Mask, q, k, v, values: Values, keys) -> tuple[jax.Array, jax.Array]:
    """o [nq, G, Bq, Dv] in q's dtype and lse [nq, G, Bq]; keys [nq, 2] is the range of key blocks per query block."""
    (nq, G, Bq, _), (Bk, Dv) = q.shape, v.shape[1:]
    accumulator = jnp.promote_types(jnp.float32, q.dtype)

    def row_block(m):
        def step(t, carry):
            A, mu, Z = carry
            n = keys[m, 1] - 1 - t  # right to left: the diagonal sets the running maximum first
            x = _product(q[m], k[n].T, accumulator)
            X = _score(score, mask, m, n, x, *_of_block(values, m, n))
            X = jnp.where(masks.visible(mask, *_indices(m, n, Bq, Bk)), X, MASKED)
            higher = jnp.maximum(mu, X.max(-1))
            E, shrink = jnp.exp(X - higher[..., None]), jnp.exp(mu - higher)
            A = A * shrink[..., None] + _product(E.astype(v.dtype), v[n], accumulator)
            return A, higher, Z * shrink + E.sum(-1)

        start = jnp.zeros((G, Bq, Dv), accumulator), jnp.full((G, Bq), LOWEST, accumulator)
        A, mu, Z = jax.lax.fori_loop(0, keys[m, 1] - keys[m, 0], step, (*start, jnp.zeros_like(start[1])))
        some = jnp.where(Z > 0, Z, 1)
        return (A / some[..., None]).astype(q.dtype), jnp.where(Z > 0, mu + jnp.log(some), -jnp.inf)

    return jax.lax.map(row_block, jnp.arange(nq, dtype=jnp.int32))


def backward(score, mask: Mask, q, k, v, values: Values, lse, delta, do, queries):
    """dq, dk, dv in the operands' dtypes and the gradient of `values`; queries [nk, 2]: query blocks per key block.

    lse [nq, G, Bq] is finite; delta [nq, G, Bq] is the sum of o do over Dv minus the cotangent of lse; do = 0 past T.
    """
    (G, Bq, D), (nk, Bk, _), Dv = q.shape[1:], k.shape, v.shape[-1]
    accumulator = jnp.promote_types(jnp.float32, q.dtype)

    def key_block(carry, n):
        def step(m, carry):
            dq, drows, dextras, dk, dv, dcols = carry
            x = _product(q[m], k[n].T, accumulator)
            X, pull = jax.vjp(lambda *of: _score(score, mask, m, n, *of), x, *_of_block(values, m, n))
            X = jnp.where(masks.visible(mask, *_indices(m, n, Bq, Bk)), X, MASKED)
            # In padded rows the score may exceed lse; those rows carry no cotangent.
            P = jnp.exp(jnp.minimum(X - lse[m][..., None], 0))
            dS = P * (_product(do[m], v[n].T, accumulator) - delta[m][..., None])
            # dx stays wide: what of_rows and of_cols (norms, say) pass to q and k may cancel with it.
            dx, of_rows, of_cols, of_extras = pull(dS)
            dq = dq.at[m].add(_product(dx, k[n].astype(accumulator), accumulator))
            dk = dk + _product(
                dx.reshape(G * Bq, Bk).T, q[m].reshape(G * Bq, D).astype(accumulator), accumulator
            )
            P = P.astype(do.dtype).reshape(G * Bq, Bk)
            dv = dv + _product(P.T, do[m].reshape(G * Bq, Dv), accumulator)
            drows = jax.tree.map(lambda total, part: total.at[m].add(part), drows, of_rows)
            dextras, dcols = jax.tree.map(jnp.add, (dextras, dcols), (of_extras, of_cols))
            return dq, drows, dextras, dk, dv, dcols

        start = jnp.zeros((Bk, D), accumulator), jnp.zeros((Bk, Dv), accumulator)
        dcols = jax.tree.map(lambda x: jnp.zeros_like(x[0]), values.cols)
        *carry, dk, dv, dcols = jax.lax.fori_loop(queries[n, 0], queries[n, 1], step, (*carry, *start, dcols))
        return tuple(carry), (dk.astype(k.dtype), dv.astype(v.dtype), dcols)

    start = jnp.zeros(q.shape, accumulator), *jax.tree.map(jnp.zeros_like, (values.rows, values.extras))
    (dq, drows, dextras), (dk, dv, dcols) = jax.lax.scan(key_block, start, jnp.arange(nk, dtype=jnp.int32))
    return dq.astype(q.dtype), dk, dv, Values(drows, dcols, dextras)


def _score(score, mask, m, n, x, of_rows, of_cols, extras):
    """X [G, Bq, Bk] of the products x [G, Bq, Bk], with row values [G, Bq], key values [G, Bk] and scalars [G]."""
    rows, cols = _indices(m, n, *x.shape[1:])

    def of_head(x, of_rows, of_cols, extras):
        of_rows, of_cols = tuple(each[:, None] for each in of_rows), tuple(each[None, :] for each in of_cols)
        return score(x, mask.q_offset + rows[:, None], cols[None, :], of_rows, of_cols, extras)

    return jax.vmap(of_head)(x, of_rows, of_cols, extras)


def _of_block(values, m, n):
    """of_rows, of_cols and extras of a pair of blocks."""
    return tuple(each[m] for each in values.rows), tuple(each[n] for each in values.cols), values.extras


def _indices(m, n, Bq, Bk):
    """Row and key indices of a block, int32 [Bq] and [Bk]."""
    return m * Bq + jnp.arange(Bq, dtype=jnp.int32), n * Bk + jnp.arange(Bk, dtype=jnp.int32)


def _product(x, y, dtype):
    """x [..., i, j] times y [j, k], accumulated in `dtype`; leading axes are folded into one large product."""
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), y, preferred_element_type=dtype, precision="highest")
    return flat.reshape(*x.shape[:-1], -1)
