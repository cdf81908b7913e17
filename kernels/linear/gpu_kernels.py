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


ROWS_ROWS, TRANSPOSED = ((1,), (1,)), ((0,), (0,))  # x y^T and x^T y


def added(dot, ins, outs, C, G):
    """What the chunk's keys add to the state: Z [P, D, E] and z [P, D]."""
    k, v = _wide(ins["k"][...]), ins["v"][...]
    g, h = _decays(ins)
    k = k if g is None else k * jnp.exp(_sums(dot, _after(_levels(C), C), g))
    v = v if h is None else _wide(v) * jnp.exp(_sums(dot, _after(_levels(C), C), h))
    inside = _document(ins, "last")
    k = k if inside is None else jnp.where(inside, k, 0)
    for p, phase in enumerate(_phases(ins, "to_end")):
        turned = k if phase is None else k * phase
        outs["Z"][p] = dot(turned, v, TRANSPOSED)
        if "z" in outs:
            outs["z"][p] = turned.sum(0)


def asked(dot, ins, outs, C, G):
    """What the chunk's rows ask of the state before it: dZ [P, D, E] and dz [P, D]."""
    g, h = _decays(ins)
    up_g = None if g is None else jnp.exp(_sums(dot, _up_to(_levels(C), C), g))
    up_h = None if h is None else jnp.exp(_sums(dot, _up_to(_levels(C), C), h))
    inside = _document(ins, "current")
    for p, phase in enumerate(_phases(ins, "to_row", (1, -1))):

        def of_head(j, sums, phase=phase):
            q, dn = _scaled(_scaled(_wide(ins["q"][:, j]), up_g), phase), _scaled(ins["dnum"][:, j], up_h)
            q = q if inside is None else jnp.where(inside, q, 0)
            Z = sums[0] + dot(q, dn, TRANSPOSED)
            return (Z, sums[1] + (q * ins["dden"][:, j][:, None]).sum(0)) if "z" in outs else (Z,)

        D, E = ins["q"].shape[2], ins["dnum"].shape[2]
        zeros = (jnp.zeros((D, E), jnp.float32), *([jnp.zeros((D,), jnp.float32)] if "z" in outs else []))
        sums = _each(G, of_head, zeros)
        outs["Z"][p] = sums[0]
        if "z" in outs:
            outs["z"][p] = sums[1]


def rows(dot, ins, outs, C, G):
    """The rows of one query head: num [C, 1, E] and den [C, 1]."""
    q, k, v, (g, h) = ins["q"][:, 0], ins["k"][...], ins["v"][...], _decays(ins)
    seen, den = _seen(ins, C), None
    if _by_channel(g, h):
        own = (_wide(q) * _wide(k)).sum(1, keepdims=True)
        n, den = own * _wide(v), own
        S = dot(q, k, ROWS_ROWS) if g is None else None

        def of_level(level, sums):
            """A summed over levels, or n where every level has factors of its own."""
            (eU, eR), (fU, fR) = (_level_factors(dot, level, C, x) for x in (g, h))
            here = S if g is None else dot(_wide(q) * eU, _wide(k) * eR, ROWS_ROWS)
            here = jnp.where(_pairs(level, C) & seen, here, 0)
            return sums + (here if h is None else fU * dot(here, _wide(v) * fR))

        zeros = jnp.zeros((C, C if h is None else v.shape[1]), jnp.float32)
        sums = jax.lax.fori_loop(0, _levels(C), of_level, zeros)
        if h is None:
            n, den = n + dot(sums, v), den + sums.sum(1, keepdims=True)
        else:
            n = n + sums
    else:
        A = jnp.where(seen, dot(q, k, ROWS_ROWS) * _toeplitz(ins, C, g), 0)
        n, den = dot(A, v), A.sum(1, keepdims=True)
    of_state, den_of_state = _read(
        dot, ins, C, _scaled(_wide(q), _exp_sums(dot, _up_to(_levels(C), C), g)), "z" in ins
    )
    outs["num"][:, 0] = n + _scaled(of_state, _exp_sums(dot, _up_to(_levels(C), C), h))
    if "den" in outs:
        outs["den"][:, 0] = (den + den_of_state).reshape(C)


def gradients(dot, ins, outs, C, G):
    """dq [C, G, D], dk [C, D], dv [C, E] and those of the decays that there are."""
    k, v, (g, h) = ins["k"][...], ins["v"][...], _decays(ins)
    seen, inside, carried = _seen(ins, C), _document(ins, "last"), _document(ins, "current")
    sums = _of_keys_to_state(dot, ins, C, k, v, g, h, inside)

    def of_head(j, sums):
        q, dn = ins["q"][:, j], ins["dnum"][:, j]
        dd = ins["dden"][:, j][:, None] if "dden" in ins else 0.0
        dq, sums = _of_rows_to_state(dot, ins, C, q, dn, dd, g, h, carried, sums)
        pairs = _of_pairs_by_channel if _by_channel(g, h) else _of_pairs
        dq, sums = pairs(dot, ins, C, q, k, v, dn, dd, g, h, seen, dq, sums)
        outs["dq"][:, j] = dq
        return sums

    sums = _each(G, of_head, sums)
    for name, x in sums.items():
        outs[name][...] = x if len(outs[name].shape) == 2 else x.reshape(C)


def _of_keys_to_state(dot, ins, C, k, v, g, h, inside):
    """Gradients by way of what the keys add to the state, whose adjoints are Y and y."""
    eR, fR = _exp_sums(dot, _after(_levels(C), C), g), _exp_sums(dot, _after(_levels(C), C), h)
    kR, vR = _scaled(_wide(k), eR), _scaled(_wide(v), fR)
    kR = kR if inside is None else jnp.where(inside, kR, 0)
    dk, dv = 0.0, 0.0
    for p, phase in enumerate(_phases(ins, "to_end")):
        Y = ins["Y"][p]
        of_k = dot(vR, Y, ROWS_ROWS, exact=True)
        of_k = of_k + ins["y"][p][None] if "y" in ins else of_k
        dk, dv = dk + _scaled(of_k, phase), dv + _scaled(dot(kR, Y, exact=True), phase)
    dk = dk if inside is None else jnp.where(inside, dk, 0)
    sums = {"dk": _scaled(dk, eR), "dv": _scaled(dv, fR)}
    if g is not None:
        sums["dg"] = _back(dot, _after(_levels(C), C), _channels(kR * dk, g))
    if h is not None:
        sums["dh"] = _back(dot, _after(_levels(C), C), vR * dv)
    return sums


def _of_rows_to_state(dot, ins, C, q, dn, dd, g, h, carried, sums):
    """dq, and what the decays get, by way of the state that the rows read."""
    eU, fU = _exp_sums(dot, _up_to(_levels(C), C), g), _exp_sums(dot, _up_to(_levels(C), C), h)
    qU, dn = _scaled(_wide(q), eU), _scaled(dn, fU)
    if carried is not None:
        dn, dd = jnp.where(carried, dn, 0), jnp.where(carried, dd, 0)
    dq = 0.0
    for p, phase in enumerate(_phases(ins, "to_row", (1, -1))):
        read = dot(dn, ins["Z"][p], ROWS_ROWS, exact=True)
        read = read + dd * ins["z"][p][None] if "z" in ins else read
        dq = dq + _scaled(read, phase)
    if g is not None:
        sums = sums | {"dg": sums["dg"] + _back(dot, _up_to(_levels(C), C), _channels(qU * dq, g))}
    if h is not None:
        n, _ = _read(dot, ins, C, qU, False)
        sums = sums | {"dh": sums["dh"] + _back(dot, _up_to(_levels(C), C), dn * n)}
    return _scaled(dq, eU), sums


def _of_pairs(dot, ins, C, q, k, v, dn, dd, g, h, seen, dq, sums):
    """Gradients by way of the pairs of the chunk, whose decay is one number, if any."""
    toe = _toeplitz(ins, C, g)
    A = jnp.where(seen, dot(q, k, ROWS_ROWS) * toe, 0)
    dA = dot(dn, v, ROWS_ROWS) + dd
    dS = jnp.where(seen, dA * toe, 0)
    sums = sums | {"dk": sums["dk"] + dot(dS, q, TRANSPOSED), "dv": sums["dv"] + dot(A, dn, TRANSPOSED)}
    if g is not None:  # g at l is held by the pairs b < l <= a
        W = dA * A
        W = jnp.cumsum(W, axis=1) - W  # [a, l], summed over b < l
        W = jnp.where(_column(C) >= _row(C), W, 0).sum(0, keepdims=True).reshape(C, 1)
        sums = sums | {"dg": sums["dg"] + W}
    return dq + dot(dS, k), sums


def _of_pairs_by_channel(dot, ins, C, q, k, v, dn, dd, g, h, seen, dq, sums):
    """Gradients by way of the pairs of the chunk, level by level of the halving."""
    own = (_wide(q) * _wide(k)).sum(1, keepdims=True)
    down = (dn * _wide(v)).sum(1, keepdims=True) + dd
    S = dot(q, k, ROWS_ROWS) if g is None else None
    dS = dot(dn, v, ROWS_ROWS) + dd if h is None else None
    sums = sums | {
        "dq": dq + down * _wide(k),
        "dk": sums["dk"] + down * _wide(q),
        "dv": sums["dv"] + own * dn,
    }
    if g is None or h is None:  # A of all levels where v has no factors, dA where q and k have none
        sums["pairs"] = jnp.zeros((C, C), jnp.float32)

    def of_level(level, sums):
        pair, (eU, eR), (fU, fR) = (
            _pairs(level, C) & seen,
            *(_level_factors(dot, level, C, x) for x in (g, h)),
        )
        qU, kR, dnU, vR = (_scaled(_wide(x), f) for x, f in ((q, eU), (k, eR), (dn, fU), (v, fR)))
        here = jnp.where(pair, S if g is None else dot(qU, kR, ROWS_ROWS), 0)
        dhere = jnp.where(pair, dS if h is None else dot(dnU, vR, ROWS_ROWS), 0)
        sums = dict(sums)
        if h is None:
            sums["pairs"] += here
        else:
            dvR = dot(here, dnU, TRANSPOSED)
            sums["dv"] += dvR * fR
            sums["dh"] += _back(dot, _up_to(level, C), dnU * dot(here, vR)) + _back(
                dot, _after(level, C), vR * dvR
            )
        if g is None:
            sums["pairs"] += dhere
        else:
            dqU, dkR = dot(dhere, kR), dot(dhere, qU, TRANSPOSED)
            sums["dq"] += dqU * eU
            sums["dk"] += dkR * eR
            sums["dg"] += _back(dot, _up_to(level, C), _channels(qU * dqU, g))
            sums["dg"] += _back(dot, _after(level, C), _channels(kR * dkR, g))
        return sums

    sums = jax.lax.fori_loop(0, _levels(C), of_level, sums)
    pairs = sums.pop("pairs", None)
    if h is None:
        sums["dv"] += dot(pairs, dn, TRANSPOSED)
    if g is None:
        sums["dq"] += dot(pairs, k)
        sums["dk"] += dot(pairs, q, TRANSPOSED)
    return sums.pop("dq"), sums


def _read(dot, ins, C, q, with_denominator):
    """What rows get of the state before the chunk: [C, E] and [C, 1] (or 0.0)."""
    inside, n, den = _document(ins, "current"), 0.0, 0.0
    q = q if inside is None else jnp.where(inside, q, 0)
    for p, phase in enumerate(_phases(ins, "to_row", (1, -1))):
        turned = _scaled(q, phase)
        n = n + dot(turned, ins["Z"][p], exact=True)
        if with_denominator:
            den = den + (turned * ins["z"][p][None]).sum(1, keepdims=True)
    return n, den


def _each(G, of_head, carry):
    return of_head(0, carry) if G == 1 else jax.lax.fori_loop(0, G, of_head, carry)


def _decays(ins):
    """g [C, 1 or D] and h [C, E], or None."""
    g, h = (ins[name][...] if name in ins else None for name in ("g", "h"))
    return g if g is None or g.ndim == 2 else g[:, None], h


def _by_channel(g, h):
    return h is not None or (g is not None and g.shape[1] > 1)


def _channels(x, g):
    """The gradient of a factor of g's channels."""
    return x if g.shape[1] > 1 else x.sum(1, keepdims=True)


def _document(ins, name):
    """Positions [C, 1] of the document `name`, or None for all."""
    return (ins["documents"][...] == ins[name][...])[:, None] if name in ins else None


def _seen(ins, C):
    earlier = _column(C) >= _row(C)
    if "documents" not in ins:
        return earlier
    documents = ins["documents"][...]
    return earlier & (documents[:, None] == documents[None])


def _phases(ins, at, signs=(1, 1)):
    """cos and sin [C, 1] of the angle times the steps "to_row" or "to_end" of each position; one None without angle."""
    if "phases" not in ins:
        return (None,)
    first = 0 if at == "to_row" else 2
    return tuple(sign * ins["phases"][first + n][:, None] for n, sign in enumerate(signs))


def _toeplitz(ins, C, g):
    """cos(angle (a - b)) exp(sum of g over b < l <= a), [C, C] (or 1.0); meaningful for b <= a."""
    toe = 1.0
    if "phases" in ins:
        cos, sin = ins["phases"][0], ins["phases"][1]
        toe = cos[:, None] * cos[None] + sin[:, None] * sin[None]
    if g is not None:
        later = jnp.where(_column(C) > _row(C), g, 0)  # [l, b]
        toe = toe * jnp.exp(jnp.cumsum(later, axis=0))
    return toe


def _level_factors(dot, level, C, g):
    """Those of rows in second halves and of keys in first ones."""
    return _exp_sums(dot, _up_to(level, C), g), _exp_sums(dot, _after(level, C), g)


def _exp_sums(dot, of, g):
    return None if g is None else jnp.exp(_sums(dot, of, g))


def _sums(dot, of, g):
    """Sums of g [C, X] over the positions that each row of `of` [C, C] marks."""
    if g.shape[1] == 1:
        return jnp.where(of, g.reshape(1, -1), 0).sum(1, keepdims=True)
    return dot(of, g, exact="sums")


def _back(dot, of, d):
    """The gradient of g from that of its sums."""
    if d.shape[1] == 1:
        return jnp.where(of, d, 0).sum(0, keepdims=True).reshape(-1, 1)
    return dot(of, d, TRANSPOSED, exact="sums")


def _levels(C):
    return C.bit_length() - 1


def _up_to(level, C):
    """Positions l <= a of a's block of 2^level, bool [C, C]."""
    return (_block(_column(C), level) == _block(_row(C), level)) & (_row(C) <= _column(C))


def _after(level, C):
    """Positions l > b of b's block of 2^level, bool [C, C]."""
    return (_block(_column(C), level) == _block(_row(C), level)) & (_row(C) > _column(C))


def _pairs(level, C):
    """Row a in the second and key b in the first half of the same 2^(level + 1) positions, bool [C, C]."""
    a, b = _block(_column(C), level), _block(_row(C), level)
    return (a & 1 == 1) & (b + 1 == a)


def _block(position, level):
    """position // 2^level."""
    return jax.lax.shift_right_logical(position, jnp.full(position.shape, level, jnp.int32))


def _column(C):
    return jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0)


def _row(C):
    return jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)


def _scaled(x, factor):
    return x if factor is None else x * factor


def _wide(x):
    return x.astype(jnp.float32)
