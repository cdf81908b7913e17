"""Prefix softmax with time split over devices: a carried state. See `kernels.sequence`.

Letters: B batch, S positions of a shard, H logit heads, K value heads, Dv value size; state (m, z, n) as in
`PrefixState`. A shard drops a state where another document ends it, and joins what its own last document sums up to.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from kernels import sequence
from kernels.prefix_softmax.arguments import Arguments, empty_state, exp_difference
from kernels.sequence import Axis, Exchange


def carried(operation, arguments: Arguments, axis: Axis):
    """o, m and z of this device's rows. The operation sums up the shard alone; the state joins its rows here."""
    a, (B, _, H) = arguments, arguments.s.shape
    state = (a.m, a.z, a.n) if a.m is not None else tuple(empty_state(B, H, a.v.shape[3], a.s.dtype))
    end = None if a.runs is None else a.runs[:, -1]

    def combine(carry, shard):
        (state, run), (own, end) = carry, shard
        return _join(_of_document(state, run, end), own), end

    # The first document of all has number 0.
    start = None if a.runs is None else jnp.zeros_like(end)
    state, run = sequence.exclusive((_own(a), end), (state, start), combine, axis)
    o, m, z = operation(dataclasses.replace(a, m=None, z=None, n=None))
    before = tuple(x[:, None] for x in state)
    before = _of_document(before, None if run is None else run[:, None], a.runs)
    m, z, n = _join(before, (lax.stop_gradient(m), z, z[..., None] * o))
    return n / jnp.where(z > 0, z, 1)[..., None], m, z


def _own(a):
    """The state of the shard's last document alone, from nothing."""
    s, groups = a.s, a.s.shape[2] // a.v.shape[2]
    if a.runs is not None:
        s = jnp.where((a.runs == a.runs[:, -1:])[..., None], s, -jnp.inf)
    m = lax.stop_gradient(s.max(1))
    w = exp_difference(s, m[:, None])
    n = jnp.einsum(
        "bskg,bskd->bkgd", w.reshape(*s.shape[:2], -1, groups), a.v.astype(s.dtype), precision="highest"
    )
    return m, w.sum(1), n.reshape(*m.shape, -1)


def _join(state, own):
    (m, z, n), (m2, z2, n2) = state, own
    highest = lax.stop_gradient(jnp.maximum(m, m2))
    old, new = (exp_difference(lax.stop_gradient(x), highest) for x in (m, m2))
    return highest, old * z + new * z2, old[..., None] * n + new[..., None] * n2


def _of_document(state, run, document):
    """The state where it is of `document` [B] or [B, S], else that of no key."""
    if run is None:
        return state
    m, z, n = state
    same = (run == document)[..., None]
    return jnp.where(same, m, -jnp.inf), jnp.where(same, z, 0), jnp.where(same[..., None], n, 0)


EXCHANGES = (Exchange(carried, lambda a, size: a.causal),)
