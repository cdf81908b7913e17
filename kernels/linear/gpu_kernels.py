"""The kernel bodies of linear attention on GPU: one chunk of one head, on tiles in registers.

Letters: C positions of a chunk, G query heads of the key/value head, D head size, E columns of the values; a a row, b
an older or the same key. Operands go by their names (`ins`, `outs`), see `gpu.py`; g and h are
logarithms of key and value decays. With U the sum of a decay up to a position and R the sum after it, in its chunk:

    added      X_p  = sum_b to_end_p(b) (k e^R(g))_b (v e^R(h))_b^T              of the chunk's last document
    rows       n_a  = sum_b A_ab v_b + e^U(h)_a Re(e^{i angle a} (q e^U(g))_a Z)  the latter in the state's document
    asked      dZ_p = sum_a at_p(a) (q e^U(g))_a (e^U(h) dn)_a^T

Pairs: with a decay of one number A_ab = q_a . k_b cos(angle (a - b)) exp(sum of g over b < l <= a). With decays a
channel a pair a > b is met in one level of a halving, a in the second and b in the first half of 2^(level + 1)
positions; its exponent is U of a in its half + R of b in its half, a factor of the row and one of the key, both <= 1.
Sums are never subtracted: no decay is too strong, and gradients that should be zero are.
"""

import jax
import jax.numpy as jnp

from kernels.linear.gpu_sides import (
    FEATURES,
    TRANSPOSED,
    Contracted,
    after,
    column,
    exp_sums,
    level_factors,
    levels,
    pairs_of,
    row,
    scaled,
    summed,
    up_to,
)  # fmt: skip


def dot(simulated: bool, operand_dtype, x, y, contracted=((1,), (0,)), exact=False):
    """x y in float32. With bfloat16 operands both in bfloat16, unless one is a state or a sum of logarithms (`exact`):
    those are multiplied in TensorFloat-32, and in three of them (which keep float32's digits) for float32 operands."""
    presets, precision = jax.lax.DotAlgorithmPreset, None
    if operand_dtype == jnp.bfloat16 and not exact:
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    else:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        precision = presets.TF32_TF32_F32_X3
        if operand_dtype != jnp.float32 and exact != "sums":
            precision = presets.TF32_TF32_F32
    if simulated:  # XLA on CPU has no such presets
        precision = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def added(dot, ins, outs, C, G):
    """What the chunk's keys add to the state: Z [P, D, E] and z [P, D]."""
    k, v = wide(ins["k"][...]), ins["v"][...]
    g, h = decays(ins)
    k = k if g is None else k * jnp.exp(summed(dot, after(levels(C), C), g))
    v = v if h is None else wide(v) * jnp.exp(summed(dot, after(levels(C), C), h))
    inside = document(ins, "last")
    k = k if inside is None else jnp.where(inside, k, 0)
    for p, phase in enumerate(phases(ins, "to_end")):
        turned = k if phase is None else k * phase
        outs["Z"][p] = dot(turned, v, TRANSPOSED)
        if "z" in outs:
            outs["z"][p] = turned.sum(0)


def asked(dot, ins, outs, C, G):
    """What the chunk's rows ask of the state before it: dZ [P, D, E] and dz [P, D]."""
    g, h = decays(ins)
    up_g = None if g is None else jnp.exp(summed(dot, up_to(levels(C), C), g))
    up_h = None if h is None else jnp.exp(summed(dot, up_to(levels(C), C), h))
    inside = document(ins, "current")
    for p, phase in enumerate(phases(ins, "to_row", (1, -1))):

        def of_head(j, sums, phase=phase):
            q, dn = scaled(scaled(wide(ins["q"][:, j]), up_g), phase), scaled(ins["dnum"][:, j], up_h)
            q = q if inside is None else jnp.where(inside, q, 0)
            Z = sums[0] + dot(q, dn, TRANSPOSED)
            return (Z, sums[1] + (q * ins["dden"][:, j][:, None]).sum(0)) if "z" in outs else (Z,)

        D, E = ins["q"].shape[2], ins["dnum"].shape[2]
        zeros = (jnp.zeros((D, E), jnp.float32), *([jnp.zeros((D,), jnp.float32)] if "z" in outs else []))
        sums = each(G, of_head, zeros)
        outs["Z"][p] = sums[0]
        if "z" in outs:
            outs["z"][p] = sums[1]


def rows(dot, ins, outs, C, G):
    """The rows of one query head: num [C, 1, E] and den [C, 1]."""
    v, (g, h) = ins["v"][...], decays(ins)
    side, seen = Contracted(dot, ins, C, FEATURES), seen_pairs(ins, C)
    n, den = side.through(
        "Z",
        lambda at: side.rows(0, at, levels(C)),
        phases(ins, "to_row", (1, -1)),
        "z" if "z" in ins else None,
    )
    inside = document(ins, "current")
    if inside is not None:
        n, den = jnp.where(inside, n, 0), jnp.where(inside, den, 0)
    n = scaled(n, exp_sums(dot, up_to(levels(C), C), h))
    if by_channel(g, h):
        own = side.own(0)
        n, den = n + own * wide(v), den + own
        S = side.pairs(0) if g is None else None

        def of_level(level, sums):
            """A summed over levels, or n where every level has factors of its own."""
            here = side.pairs(0, level) if S is None else S
            here = jnp.where(pairs_of(level, C) & seen, here, 0)
            fU, fR = level_factors(dot, level, C, h)
            return sums + (here if h is None else fU * dot(here, wide(v) * fR))

        zeros = jnp.zeros((C, C if h is None else v.shape[1]), jnp.float32)
        sums = jax.lax.fori_loop(0, levels(C), of_level, zeros)
        if h is None:
            n, den = n + dot(sums, v), den + sums.sum(1, keepdims=True)
        else:
            n = n + sums
    else:
        A = jnp.where(seen, side.pairs(0) * toeplitz(ins, C, g), 0)
        n, den = n + dot(A, v), den + A.sum(1, keepdims=True)
    outs["num"][:, 0] = n
    if "den" in outs:
        outs["den"][:, 0] = den.reshape(C)


def each(G, of_head, carry):
    return of_head(0, carry) if G == 1 else jax.lax.fori_loop(0, G, of_head, carry)


def decays(ins):
    """g [C, 1 or D] and h [C, E], or None."""
    g, h = (ins[name][...] if name in ins else None for name in ("g", "h"))
    return g if g is None or g.ndim == 2 else g[:, None], h


def by_channel(g, h):
    return h is not None or (g is not None and g.shape[1] > 1)


def document(ins, name):
    """Positions [C, 1] of the document `name`, or None for all."""
    return (ins["documents"][...] == ins[name][...])[:, None] if name in ins else None


def seen_pairs(ins, C):
    earlier = column(C) >= row(C)
    if "documents" not in ins:
        return earlier
    documents = ins["documents"][...]
    return earlier & (documents[:, None] == documents[None])


def phases(ins, at, signs=(1, 1)):
    """cos and sin [C, 1] of the angle times the steps "to_row" or "to_end" of each position; one None without angle."""
    if "phases" not in ins:
        return (None,)
    first = 0 if at == "to_row" else 2
    return tuple(sign * ins["phases"][first + n][:, None] for n, sign in enumerate(signs))


def toeplitz(ins, C, g):
    """cos(angle (a - b)) exp(sum of g over b < l <= a), [C, C] (or 1.0); meaningful for b <= a."""
    toe = 1.0
    if "phases" in ins:
        cos, sin = ins["phases"][0], ins["phases"][1]
        toe = cos[:, None] * cos[None] + sin[:, None] * sin[None]
    if g is not None:
        later = jnp.where(column(C) > row(C), g, 0)  # [l, b]
        toe = toe * jnp.exp(jnp.cumsum(later, axis=0))
    return toe


def wide(x):
    return x.astype(jnp.float32)
