"""Sums of log gates for one block of scores, without differences of large cumulative sums, and their gradient.

D_ij = sum of log_f over j < l <= a_i. Read for one key/value head: G query heads, S keys in nk chunks of Bk, T rows in
nq blocks of Bq; a_i is the position of row i, a0_m that of the first row of block m, e_n the last key of chunk n.

    e_n <= a0_m:   D_ij = (u_i + gap_mn) + w_j      three sums of one sign, small wherever the weight is not negligible
    otherwise:     D_ij summed from the row down to the key, in two levels (the few blocks on the diagonal)
    u_i = sum over a0_m < l <= a_i,   gap_mn = sum over e_n < l <= a0_m,   w_j = sum over j < l <= e_n
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LocalDecay:
    """The sums above: gates and w [nk, G, Bk], row gates and u [nq, G, Bq], gap [nq, nk, G]."""

    gates: jax.Array
    w: jax.Array
    row_gates: jax.Array
    u: jax.Array
    gap: jax.Array

    def block(self, m, n, positions, diagonal: bool) -> jax.Array:
        """D of query block m (absolute `positions` [Bq]) and key chunk n, [G, Bq, Bk]; `diagonal` iff e_n > a0_m."""
        if not diagonal:
            return (self.u[m] + self.gap[m, n][:, None])[:, :, None] + self.w[n][:, None, :]
        keys = n * self.gates.shape[-1] + jnp.arange(self.gates.shape[-1])
        reached = jnp.where(keys <= positions[:, None], self.gates[n][:, None, :], 0)
        beyond = _prefix_sum(jnp.where(positions > keys[-1], self.row_gates[m], 0))
        return suffix_sum(reached, exclusive=True) + beyond[:, :, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GlobalDecay:
    """c_{a_i} - c_j from one cumulative sum per head: rows [nq, G, Bq], keys [nk, G, Bk]. Loses digits as |c| grows."""

    rows: jax.Array
    keys: jax.Array

    def block(self, m, n, positions, diagonal: bool) -> jax.Array:
        """D of query block m and key chunk n, [G, Bq, Bk]."""
        return self.rows[m][:, :, None] - self.keys[n][:, None, :]


def prepare(log_f: jax.Array, q_offset, nq: int, Bq: int, Bk: int, mode: str) -> LocalDecay | GlobalDecay:
    """Decay sums of one key/value head from log_f [G, nk * Bk] (0 at padding)."""
    positions = q_offset + jnp.arange(nq * Bq)
    if mode == "global":
        c = jnp.cumsum(log_f, axis=-1)
        return GlobalDecay(_blocks(jnp.take(c, positions, axis=-1, mode="clip"), Bq), _blocks(c, Bk))
    gates = _blocks(log_f, Bk)
    inside = (positions >= 0) & (positions < log_f.shape[-1])
    row_gates = _blocks(jnp.where(inside, jnp.take(log_f, positions, axis=-1, mode="clip"), 0), Bq)
    u = _prefix_sum(jnp.where(jnp.arange(Bq) == 0, 0, row_gates))
    gap = gaps(log_f, positions[::Bq], Bk)
    return LocalDecay(gates, suffix_sum(gates, exclusive=True), row_gates, u, jnp.moveaxis(gap, 0, -1))


def gaps(log_f: jax.Array, tops: jax.Array, Bk: int) -> jax.Array:
    """gap_mn: sum of log_f [..., S] over e_n < l <= tops[m], [..., nq, ceil(S / Bk)]; 0 if no such l."""
    chunks = _split(log_f, Bk)
    inside = _prefix_sum(chunks).reshape(*chunks.shape[:-2], -1)
    upto = jnp.take(inside, tops, axis=-1, mode="clip")[..., None]
    of_top, z = (tops // Bk)[:, None], jnp.arange(chunks.shape[-2])
    sums = jnp.where(z < of_top, chunks.sum(-1)[..., None, :], jnp.where(z == of_top, upto, 0))
    return suffix_sum(sums, exclusive=True)


def suffix_sum(x: jax.Array, *, exclusive: bool = False, chunk: int = CHUNK) -> jax.Array:
    """Reversed cumulative sum along the last axis, level by level: in chunks by a triangular product, then across."""
    N = x.shape[-1]
    chunks = _split(x, min(chunk, N))
    c, count = chunks.shape[-1], chunks.shape[-2]
    within = jnp.matmul(chunks, np.tri(c, k=-int(exclusive), dtype=x.dtype), precision="highest")
    if count == 1:
        return within[..., 0, :N]
    after = suffix_sum(chunks.sum(-1), exclusive=True)
    return (within + after[..., None]).reshape(*x.shape[:-1], -1)[..., :N]


def _prefix_sum(x):
    """Inclusive cumulative sum of a short last axis; a triangular product compiles to far less than a scan."""
    return jnp.matmul(x, np.tri(x.shape[-1], dtype=x.dtype).T, precision="highest")


def gate_gradient(dc: jax.Array, runs: jax.Array | None) -> jax.Array:
    """dlog_f_l = sum of dc_j over j >= l, [G, S]; with `runs` [S] (non-decreasing) over the keys of the same run only.

    No pair of a query and a key crosses the border of two runs, so later runs sum to zero; leaving them out makes the
    isolation of packed documents exact.
    """
    if runs is None:
        return suffix_sum(dc)
    chunks, run = _split(dc, CHUNK), _split(runs, CHUNK, mode="edge")
    same = (run[:, :, None] == run[:, None, :]) & np.tri(CHUNK, dtype=bool)
    within = jnp.einsum("gnl,nlj->gnj", chunks, same.astype(dc.dtype), precision="highest")
    whole = run[:, 0] == run[:, -1]

    def across(later, chunk):
        """`later` is the sum over the run that holds the first key after this chunk."""
        head, last_run, next_run, is_whole = chunk
        later = jnp.where(last_run == next_run, later, 0)
        return head + jnp.where(is_whole, later, 0), later

    next_run = jnp.append(run[1:, 0], run[-1, -1])
    _, later = jax.lax.scan(across, jnp.zeros(dc.shape[0], dc.dtype), (within[:, :, 0].T, run[:, -1], next_run, whole),
                            reverse=True)  # fmt: skip
    tail = jnp.where(run == run[:, -1:], later.T[:, :, None], 0)
    return (within + tail).reshape(dc.shape[0], -1)[:, : dc.shape[-1]]


def _split(x, size, mode="constant"):
    """[..., N] -> [..., ceil(N / size), size]."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return jnp.pad(x, padding, mode=mode).reshape(*x.shape[:-1], -1, size)


def _blocks(x, size):
    """[G, N] -> [N / size, G, size]."""
    return x.reshape(x.shape[0], -1, size).swapaxes(0, 1)
