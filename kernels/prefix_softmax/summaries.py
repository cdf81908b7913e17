"""What chunks of positions come to as a whole, and their scan: the part of the GPU form that is linear in the chunks.

Letters: B batch, N chunks of C positions, H logit heads, Dv value size; m, z, R, ref [B, N, H] and n, G [B, N, H, Dv].
Documents are numbered in order along a row (`runs`): sums over neighbouring chunks of one number are of one document.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.prefix_softmax.arguments import exp_difference


class Sums(NamedTuple):
    """Keys of the last document of some chunks, scaled to their largest logit m (forward), or rows of the first one,
    scaled to the first row's maximum m (backward: z is R and n is G); run [B, N, 1] is that document's number."""

    m: jax.Array
    z: jax.Array
    n: jax.Array
    run: jax.Array


def states_before(sums: Sums, initial: Sums) -> Sums:
    """The state before each of N chunks, whose own keys are `sums`; `initial` [B, 1, ...] comes before all."""
    chain = Sums(*(jnp.concatenate([a, b[:, :-1]], axis=1) for a, b in zip(initial, sums, strict=True)))
    return jax.lax.associative_scan(_join, chain, axis=1)


def sums_from(sums: Sums) -> Sums:
    """The rows of each chunk and all later ones."""
    return jax.lax.associative_scan(lambda later, chunk: _join_rows(chunk, later), sums, reverse=True, axis=1)


def sums_after(of_all: Sums, last: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(G, R) of the rows behind each chunk, scaled to its last row's maximum `last` [B, N, H], where they are of its
    last document `end` [B, N, 1]."""
    after = Sums(*(jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1) for x in of_all))
    f = jnp.where(end == after.run, exp_difference(last, after.m), 0).at[:, -1].set(0)
    return f[..., None] * after.n, f * after.z


def _join(before, here):
    """A chunk's keys with those before it."""
    m_before = jnp.where(before.run == here.run, before.m, -jnp.inf)
    m = jnp.maximum(m_before, here.m)
    x, y = exp_difference(m_before, m), exp_difference(here.m, m)
    n = x[..., None] * before.n + y[..., None] * here.n
    return Sums(m, x * before.z + y * here.z, n, here.run)


def _join_rows(here, later):
    """A chunk's rows with those behind it."""
    f = jnp.where(here.run == later.run, exp_difference(here.m, later.m), 0)
    return Sums(here.m, here.z + f * later.z, here.n + f[..., None] * later.n, here.run)
