"""The gradients of linear attention on GPU: one chunk of one key/value head, and a block of channels of one side.

Letters and decays as in `gpu_kernels.py`; X channels of the block. A side is (q, k, g) or (dnum, v, h), and its
gradients are sums over the other one's channels, which gives one code for both:

    features   dq = dA k + at (dn Z^T + dd z)    dk = dA^T q + to_end (v Y^T + y)    with dA = dn v^T + dd
    values                                       dv = A^T dn + to_end k Y            with A = q k^T

A decay gets, at its position, what both factors bring that hold it: its sums are never subtracted.
"""

import jax
import jax.numpy as jnp

from kernels.linear.gpu_kernels import by_channel, decays, document, each, phases, seen_pairs, toeplitz, wide
from kernels.linear.gpu_sides import (
    FEATURES,
    ROWS_ROWS,
    TRANSPOSED,
    VALUES,
    Contracted,
    after,
    back,
    column,
    level_factors,
    levels,
    pairs_of,
    row,
    scaled,
    up_to,
)  # fmt: skip


def of_features(dot, ins, outs, C, G):
    """dq [C, G, X], dk [C, X] and, with a decay of channels, dg [C, X]; of one number its share, "dg_share" [C]."""
    _gradients(dot, ins, outs, C, G, FEATURES, VALUES)


def of_values(dot, ins, outs, C, G):
    """dv [C, X] and, with a decay, dh [C, X]."""
    _gradients(dot, ins, outs, C, G, VALUES, FEATURES)


def _gradients(dot, ins, outs, C, G, mine, theirs):
    other, key, decay = Contracted(dot, ins, C, theirs), wide(ins[mine.key][...]), decays(ins)[mine is VALUES]
    pairs = _of_pairs_by_channel if by_channel(*decays(ins)) else _of_pairs

    def of_head(j, sums):
        query, dd = wide(ins[mine.row][:, j]), 0.0
        if mine is FEATURES and "dden" in ins:
            dd = ins["dden"][:, j][:, None]
        dquery = 0.0
        if mine is FEATURES or decay is not None:
            dquery, sums = _through_before(dot, ins, C, other, j, query, dd, decay, sums)
        dquery, sums = pairs(dot, ins, C, other, j, query, key, dd, decay, dquery, sums)
        if mine is FEATURES:
            outs["dq"][:, j] = dquery
        return sums

    sums = each(G, of_head, _through_after(dot, ins, C, other, key, decay))
    outs[f"d{mine.key}"][...] = sums["key"]
    if decay is not None and f"d{mine.decay}" in outs:
        outs[f"d{mine.decay}"][...] = sums["decay"]
    elif decay is not None:
        outs["dg_share"][...] = sums["decay"].reshape(C)


def _through_after(dot, ins, C, other, key, decay):
    """Gradients by way of what the keys add to the state after the chunk, whose adjoints are Y and y."""
    chunk, inside, turns = levels(C), document(ins, "last"), phases(ins, "to_end")
    dkey, _ = other.through("Y", lambda at: other.keys(at, chunk), turns)
    if other.side is VALUES and "y" in ins:
        dkey = dkey + _vector(ins["y"], 1.0, turns)
    _, eR = level_factors(dot, chunk, C, decay)
    dkey = scaled(dkey if inside is None else jnp.where(inside, dkey, 0), eR)
    return {"key": dkey} | (
        {} if decay is None else {"decay": _held(dot, after(chunk, C), key * dkey, decay)}
    )


def _through_before(dot, ins, C, other, j, query, dd, decay, sums):
    """Those of the rows of a head, and of the decay, by way of the state Z, z that they read."""
    chunk, inside, turns = levels(C), document(ins, "current"), phases(ins, "to_row", (1, -1))
    dquery, _ = other.through("Z", lambda at: other.rows(j, at, chunk), turns)
    if other.side is VALUES and "dden" in ins:
        dquery = dquery + _vector(ins["z"], dd, turns)
    eU, _ = level_factors(dot, chunk, C, decay)
    dquery = scaled(dquery if inside is None else jnp.where(inside, dquery, 0), eU)
    if decay is not None:
        sums = sums | {"decay": sums["decay"] + _held(dot, up_to(chunk, C), query * dquery, decay)}
    return dquery, sums


def _of_pairs(dot, ins, C, other, j, query, key, dd, decay, dquery, sums):
    """Gradients by way of the pairs of the chunk, whose decay is one number, if any."""
    W = jnp.where(seen_pairs(ins, C), (other.pairs(j) + dd) * toeplitz(ins, C, decays(ins)[0]), 0)
    sums = sums | {"key": sums["key"] + dot(W, query, TRANSPOSED)}
    if decay is not None:  # g at l is held by the pairs b < l <= a
        held = W * dot(query, key, ROWS_ROWS)
        held = jnp.cumsum(held, axis=1) - held  # [a, l], summed over b < l
        held = jnp.where(column(C) >= row(C), held, 0).sum(0, keepdims=True).reshape(C, 1)
        sums = sums | {"decay": sums["decay"] + held}
    return dquery + dot(W, key) if other.side is VALUES else dquery, sums


def _of_pairs_by_channel(dot, ins, C, other, j, query, key, dd, decay, dquery, sums):
    """Gradients by way of the pairs of the chunk, level by level of the halving; a position's own pair apart."""
    seen, theirs, own = seen_pairs(ins, C), other.side.decay in ins, other.own(j) + dd
    W = None if theirs else other.pairs(j) + dd
    sums = sums | {"key": sums["key"] + own * query}
    dquery = dquery + own * key

    def of(level):
        return jnp.where(pairs_of(level, C) & seen, other.pairs(j, level) + dd if theirs else W, 0)

    def of_level(level, carry):
        here, (U, R), (dquery, sums) = of(level), level_factors(dot, level, C, decay), carry
        drow = dot(here, key * R) * U
        dkey = dot(here, query * U, TRANSPOSED) * R
        held = _held(dot, up_to(level, C), query * drow, decay) + _held(
            dot, after(level, C), key * dkey, decay
        )
        return dquery + drow, {"key": sums["key"] + dkey, "decay": sums["decay"] + held}

    if decay is not None:
        return jax.lax.fori_loop(0, levels(C), of_level, (dquery, sums))
    nothing = jnp.zeros((C, C), jnp.float32)
    pairs = jax.lax.fori_loop(0, levels(C), lambda level, pairs: pairs + of(level), nothing)
    return dquery + dot(pairs, key), sums | {"key": sums["key"] + dot(pairs, query, TRANSPOSED)}


def _vector(ref, factor, turns):
    """Sum over parts of phase x factor x vector, [C or 1, X]."""
    return sum(scaled(factor * ref[p][None], phase) for p, phase in enumerate(turns))


def _held(dot, of, d, decay):
    """The gradient of a decay from d, that of the logarithms of factors which hold its sums `of` positions."""
    return back(dot, of, d if decay.shape[1] > 1 else d.sum(1, keepdims=True))
