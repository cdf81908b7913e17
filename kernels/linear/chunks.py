"""Causal linear attention in chunks: a scan that carries the state, with its own gradient in two more scans.

Letters: B batch, L positions (query and key t together), N chunks of C, K key/value heads, G query heads each, D head
size, E = Dv + 1 columns; P parts of the state Z [P, B, K, D, E]: the real one, and the imaginary one if there is an
angle. a and b number positions in a chunk, angles inside are relative to its first position:

    toe_ab = cos(angle (a - b)) [b <= a] [same document]
    n_a    = sum_b toe_ab (q_a . k_b) [v_b, 1] + Re(e^{i angle a} Z)^T q_a
    Z     <- e^{i angle C} Z + sum_b e^{i angle (C - b)} k_b [v_b, 1]^T

A state belongs to one document: rows of others do not read it, and it is dropped where the next one begins. The
gradient G of n rebuilds Z chunk by chunk for the queries, then carries Y, the queries seen from a chunk's end, backward
for keys and values:

    dq_a = sum_b toe_ab (G_a . [v_b, 1]) k_b + Re(e^{i angle a} Z) G_a
    dk_b = sum_a toe_ab (G_a . [v_b, 1]) q_a + Re(e^{i angle (C - b)} Y) [v_b, 1],     dv_b alike
    Y   <- e^{i angle C} Y + sum_a e^{i angle a} q_a G_a^T
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.linear.states import with_ones


class Tables(NamedTuple):
    """Cosines and sines of a chunk: those at a, those at C - a [P, B or 1, C]; toe [B or 1, C, C]; the turn by C."""

    at: jax.Array
    to_end: jax.Array
    toe: jax.Array
    turn: jax.Array  # [P, P, B or 1]
    sign: jax.Array  # [P]: 1, -1, of the real part of a product


def make_tables(angle: jax.Array | None, C: int, dtype) -> Tables:
    """angle [B or 1] in radians a position, or None for 0."""
    earlier = jnp.tri(C, dtype=bool)
    if angle is None:
        one = jnp.ones((1, 1, C), dtype)
        return Tables(one, one, earlier[None].astype(dtype), one[:, :, :1], one[0, 0, :1])
    steps = jnp.arange(C + 1, dtype=dtype)
    phase = angle[:, None] * steps
    parts = jnp.stack([jnp.cos(phase), jnp.sin(phase)])
    toe = jnp.where(earlier, jnp.cos(angle[:, None, None] * (steps[:C, None] - steps[:C])), 0)
    cos, sin = parts[..., -1]
    turn = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
    return Tables(parts[..., :C], parts[..., :0:-1], toe, turn, jnp.array([1, -1], dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked(C, ones, q, k, v, angle, segments, state, segment):
    """The sweep over chunks.

    C chunk size, dividing L; ones: v gets a column of ones, E = Dv + 1, else E = Dv; q [B, K, G, L, D]; k [B, K, L, D];
    v [B, K, L, Dv]; angle [B or 1] or None (a constant); segments int32 [B, L] or None, each document one run; state
    [P, B, K, D, E] of the document `segment` [B]. Returns n [B, K, G, L, E] and the state after L positions, in the
    state's dtype.
    """
    return _forward(C, ones, q, k, v, angle, segments, state, segment)[0]


def _forward(C, ones, q, k, v, angle, segments, state, segment):
    tables = make_tables(angle, C, state.dtype)

    def chunk(carry, x):
        Z, current = carry
        q, k, v, ids = _widen(x, ones, state.dtype)
        n = _product("bkgac,bkce->bkgae", _scores(tables, q, k, ids), v)
        n = n + _product("pbkgad,pbkde->bkgae", _phased(_same(q, ids, current), tables.at, tables.sign), Z)
        return _append(tables, Z, current, k, v, ids), n

    (Z, _), n = lax.scan(chunk, (state, segment), _split(C, q, k, v, segments))
    return (_join(n), Z), (q, k, v, angle, segments, state, segment)


def _backward(C, ones, residuals, cotangents):
    q, k, v, angle, segments, state, segment = residuals
    G, dZ = cotangents
    tables = make_tables(angle, C, state.dtype)
    chunks = (*_split(C, q, k, v, segments), _chunks(G, C))

    def of_queries(carry, x):
        Z, current = carry
        q, k, v, ids = _widen(x[:4], ones, state.dtype)
        P = _scores(tables, x[4], v, ids)
        dq = _product("bkgac,bkcd->bkgad", P, k)
        read = _product("bkgae,pbkde->pbkgad", x[4], Z)
        dq = dq + _same(_phased(read, tables.at, tables.sign, of_state=True).sum(0), ids, current)
        return _append(tables, Z, current, k, v, ids), dq.astype(x[0].dtype)

    def of_keys(carry, x):
        Y, following = carry
        q, k, v, ids = _widen(x[:4], ones, state.dtype)
        G = x[4]
        dk = _product("bkgac,bkgad->bkcd", _scores(tables, G, v, ids), q)
        dv = _product("bkgac,bkgae->bkce", _scores(tables, q, k, ids), G)
        seen = _phased(_same(k, ids, following), tables.to_end, tables.sign)
        dv = dv + _product("pbkcd,pbkde->bkce", seen, Y)
        read = _product("bkce,pbkde->pbkcd", v, Y)
        dk = dk + _same(_phased(read, tables.to_end, tables.sign, of_state=True).sum(0), ids, following)
        first = None if ids is None else ids[:, 0]
        new = _product("pbkgad,bkgae->pbkde", _phased(_same(q, ids, first), tables.at), G)
        Y = _kept(_product("pqb,qbkde->pbkde", tables.turn, Y), first, following) + new
        return (Y, first), (dk.astype(x[1].dtype), dv[..., : x[2].shape[-1]].astype(x[2].dtype))

    _, dq = lax.scan(of_queries, (state, segment), chunks)
    last = None if segments is None else segments[:, -1]
    conjugate = tables.sign[:, None, None, None, None]
    (Y, first), (dk, dv) = lax.scan(of_keys, (conjugate * dZ, last), chunks, reverse=True)
    dstate = conjugate * _kept(Y, first, segment)
    zero = None if angle is None else jnp.zeros_like(angle)
    return _join(dq), _join(dk), _join(dv), zero, None, dstate, None


chunked.defvjp(_forward, _backward)


def _scores(tables, x, y, ids):
    """toe_ab (x_a . y_b): x [B, K, G, C, D], y [B, K, C, D] -> [B, K, G, C, C]."""
    toe = tables.toe if ids is None else jnp.where(ids[:, :, None] == ids[:, None], tables.toe, 0)
    return _product("bkgad,bkcd->bkgac", x, y) * toe[:, None, None]


def _append(tables, Z, current, k, v, ids):
    last = None if ids is None else ids[:, -1]
    new = _product("pbkcd,bkce->pbkde", _phased(_same(k, ids, last), tables.to_end), v)
    return _kept(_product("pqb,qbkde->pbkde", tables.turn, Z), last, current) + new, last


def _phased(x, phases, sign=None, of_state=False):
    """x [B, K, (G,) C, D] times each of the P phases at its position; of_state: x has the parts in front already."""
    phases = phases if sign is None else phases * sign[:, None, None]
    heads = x.ndim - of_state - 3
    return x * phases.reshape(*phases.shape[:2], *(1,) * heads, phases.shape[2], 1)


def _same(x, ids, document):
    """x [B, K, (G,) C, D] with zeros at positions outside `document` [B]."""
    if ids is None:
        return x
    inside = (ids == document[:, None]).reshape(ids.shape[0], *(1,) * (x.ndim - 3), ids.shape[1], 1)
    return jnp.where(inside, x, 0)


def _kept(Z, document, other):
    """Z [P, B, K, D, E] where two numbers of documents agree, else zeros."""
    return Z if document is None else jnp.where((document == other)[:, None, None, None], Z, 0)


def _split(C, q, k, v, segments):
    """The operands cut into chunks, chunks in front."""
    ids = None if segments is None else segments.reshape(segments.shape[0], -1, C).swapaxes(0, 1)
    return _chunks(q, C), _chunks(k, C), _chunks(v, C), ids


def _widen(x, ones, dtype):
    """The chunk's q, k, [v, 1] (v without ones) in the dtype of sums, and its documents."""
    q, k, v, ids = x
    v = v.astype(dtype)
    return q.astype(dtype), k.astype(dtype), with_ones(v) if ones else v, ids


def _chunks(x, C):
    """[..., L, D] -> [N, ..., C, D]."""
    return jnp.moveaxis(x.reshape(*x.shape[:-2], -1, C, x.shape[-1]), -3, 0)


def _join(x):
    """[N, ..., C, D] -> [..., L, D]."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, precision="highest")
