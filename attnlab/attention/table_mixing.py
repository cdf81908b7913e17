"""Sums over keys whose weights come from tables over positions, a block of rows at a time.

Letters: B batch, T queries, S keys, R a block of query rows, H heads, K value heads, D and Dv head sizes, N table
length; t a query and j a key, as positions in their own document (0 is its first token).

    o_t = sum_j w_tj v_j      w_tj = softmax_j(x_tj), or x_tj itself, over the visible keys j

`Table`, `Slice`, `Product`, `Blend` and `Waves` say what x is; `mix` sums. Used by `synthesizer.py` and
`position_mixing.py`, whose functions share these keywords: mask (which keys a row sees, causal by default);
q_positions [B or 1, T] and kv_positions [B or 1, S] (the table rows and columns to read: 0, 1, 2, ... without them; a
row past the table is NaN); implementation ("blockwise", "reference", None for the platform's best).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels import dispatch, masks
from kernels.dispatch import Implementation
from kernels.masks import Mask

BLOCK = 256  # rows at once: the weights of no more are held, [B, H, BLOCK, S]


# --- scores of a block of rows -----------------------------------------------------------------------------
# Each is a tree of arrays with a method rows(index [R]) -> [B or 1, H, R, S].


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """entries [H, N, N] read at query positions t [B or 1, T] and key positions j [B or 1, S]."""

    entries: jax.Array
    t: jax.Array
    j: jax.Array

    def rows(self, index):
        last = self.entries.shape[-1] - 1
        t, j = (jnp.clip(x, 0, last) for x in (jnp.take(self.t, index, axis=1, mode="clip"), self.j))
        return self.entries[:, t[:, :, None], j[:, None, :]].swapaxes(0, 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slice:
    """entries [H, T, S]: a table already read at positions all batch rows share."""

    entries: jax.Array

    def rows(self, index):
        return jnp.take(self.entries, index, axis=1, mode="clip")[None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Product:
    """A_t[j mod a] B_t[j div a] for A [B, T, H, a], B [B, T, H, b], key positions j [B or 1, S]."""

    A: jax.Array
    B: jax.Array
    j: jax.Array

    def rows(self, index):
        a, j = self.A.shape[-1], jnp.maximum(self.j, 0)[:, None, None]

        def pick(x, at):
            x = jnp.take(x, index, axis=1, mode="clip").swapaxes(1, 2)
            at = jnp.broadcast_to(jnp.clip(at, 0, x.shape[-1] - 1), (*x.shape[:3], at.shape[-1]))
            return jnp.take_along_axis(x, at, axis=-1)

        return pick(self.A, j % a) * pick(self.B, j // a)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blend:
    """(1 - share) q.k / sqrt(D) + share * table; q [B, T, H, D], k [B, S, K, D], share a scalar."""

    q: jax.Array
    k: jax.Array
    share: jax.Array
    table: Table | Slice

    def rows(self, index):
        q, k = jnp.take(self.q, index, axis=1, mode="clip"), self.k
        (B, R, H, D), K = q.shape, k.shape[2]
        q = q.reshape(B, R, K, H // K, D)
        s = jnp.einsum("brkgd,bskd->bkgrs", q, k, precision="highest").reshape(B, H, R, -1)
        return (1 - self.share) * s / math.sqrt(D) + self.share * self.table.rows(index)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Waves:
    """cos and -sin of 2 pi t j / N as two heads, the product reduced modulo N in integers."""

    t: jax.Array
    j: jax.Array
    period: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    def rows(self, index):
        t = jnp.take(self.t, index, axis=1, mode="clip") % self.period
        step = (t[:, :, None] * (self.j % self.period)[:, None, :]) % self.period
        angle = (2 * math.pi / self.period) * step.astype(self.dtype)
        return jnp.stack([jnp.cos(angle), -jnp.sin(angle)], axis=1)


def read_table(entries: jax.Array, T: int, S: int, t: jax.Array | None, j: jax.Array | None):
    """A Table, or the cheaper Slice of its leading rows and columns if positions are 0, 1, 2, ... (None: they are)."""
    entries = entries.astype(jnp.promote_types(jnp.float32, entries.dtype))
    leading = entries[:, :T, :S]
    if t is None:
        return Slice(leading)
    if t.shape[0] > 1 or j.shape[0] > 1 or max(T, S) > entries.shape[1]:
        return Table(entries, t, j)
    plain = jnp.all(t == jnp.arange(T)) & jnp.all(j == jnp.arange(S))
    whole = jnp.arange(T)
    return Slice(jax.lax.cond(plain, lambda: leading, lambda: Table(entries, t, j).rows(whole)[0]))


# --- the sum over keys -------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """scores: one of the above; v [B, S, K, Dv]; softmax: whether scores are logits or the weights themselves."""

    scores: Any
    v: jax.Array
    mask: Mask
    queries: int = dataclasses.field(metadata={"static": True})
    softmax: bool = dataclasses.field(metadata={"static": True})


def reference(a: Arguments) -> jax.Array:
    """All rows at once: o [B, T, H, Dv] in the accumulation dtype."""
    return _mix_rows(a, jnp.arange(a.queries))


def blockwise(a: Arguments) -> jax.Array:
    """Blocks of rows after each other, whose weights are computed again for the gradient."""
    if a.queries <= BLOCK:
        return _mix_rows(a, jnp.arange(a.queries))
    count = math.ceil(a.queries / BLOCK)
    index = jnp.minimum(jnp.arange(count * BLOCK), a.queries - 1).reshape(count, BLOCK)
    o = jax.lax.map(jax.checkpoint(lambda index: _mix_rows(a, index)), index)  # [count, B, BLOCK, H, Dv]
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, : a.queries]


IMPLEMENTATIONS = (Implementation("blockwise", blockwise), Implementation("reference", reference))


def _mix_rows(a: Arguments, index: jax.Array) -> jax.Array:
    (B, S, K, Dv), wide = a.v.shape, jnp.promote_types(jnp.float32, a.v.dtype)
    seen = masks.visible(a.mask, index, jnp.arange(S))[:, None]
    x = a.scores.rows(index).astype(wide)
    if a.softmax:
        some = seen.any(-1, keepdims=True)
        x = jax.nn.softmax(jnp.where(seen, x, jnp.where(some, -jnp.inf, 0.0)), axis=-1)
    w = jnp.where(seen, x, 0)
    shared, H, R = w.shape[0] == 1, w.shape[1], w.shape[2]
    w = w.reshape(*w.shape[:1] * (not shared), K, H // K, R, S)
    letters = "kgrs,bskd->brkgd" if shared else "bkgrs,bskd->brkgd"
    return jnp.einsum(letters, w, a.v.astype(wide), precision="highest").reshape(B, R, H, Dv)


def mix(scores, v, queries: int, mask: Mask, softmax: bool, implementation: str | None) -> jax.Array:
    """sum_j w_tj v_j, [B, T, H, Dv] in the accumulation dtype; w is the softmax of the scores or the scores."""
    B, S = v.shape[:2]
    arguments = Arguments(scores, v, masks.validate(mask, B, queries, S), queries, softmax)
    return dispatch.run(IMPLEMENTATIONS, implementation, arguments)


def poison_rows(o: jax.Array, t: jax.Array | None, table_length: int, mask: Mask) -> jax.Array:
    """NaN for rows at positions past the table; o [B, T, ...], t [B or 1, T]. Rows of padding stay as they are."""
    if t is None:
        return o
    past = t >= table_length
    if mask.q_segments is not None:
        past = past & (mask.q_segments != 0)
    return jnp.where(past.reshape(*past.shape, *(1,) * (o.ndim - 2)), jnp.nan, o)


def check_positions(table_length: int, B: int, T: int, S: int, t, j) -> None:
    """ValueError unless the positions, or without them 0, 1, 2, ..., can be read from the table."""
    if (t is None) != (j is None):
        raise ValueError("q_positions and kv_positions belong together; give both or neither")
    if t is None and max(T, S) > table_length:
        raise ValueError(f"{max(T, S)} positions do not fit a table of {table_length}; make a longer table")
    if t is not None and not {t.shape[0], j.shape[0]} <= {1, B}:
        raise ValueError(
            f"q_positions {t.shape} and kv_positions {j.shape} need 1 or {B=} rows; give one for all, or one each"
        )


def check_heads(H: int, K: int) -> None:
    if H % K:
        raise ValueError(f"{H=} heads of the table must be a multiple of the {K=} value heads")


def of_table(entries, v, softmax: bool, mask: Mask, t, j, implementation) -> jax.Array:
    """`mix` for a table [H, N, N], checked; o [B, T, H, Dv] in v's dtype."""
    B, S = v.shape[:2]
    T = S if t is None else t.shape[1]
    check_positions(entries.shape[1], B, T, S, t, j)
    check_heads(entries.shape[0], v.shape[2])
    o = mix(read_table(entries, T, S, t, j), v, T, mask, softmax, implementation)
    return poison_rows(o, t, entries.shape[1], mask).astype(v.dtype)


def rows_of(factor: jax.Array, length: int, positions: jax.Array | None) -> jax.Array:
    """[B or 1, length, H, r] of factor [H, N, r] at positions [B or 1, length]."""
    by_position = factor.swapaxes(0, 1)
    if positions is None:
        return by_position[None, :length]
    return jnp.take(by_position, jnp.clip(positions, 0, factor.shape[1] - 1), axis=0)


def random_table(std: float):
    """Initialiser for [H, N, M]: normal, an entry depends on the key and its last two indices alone.

    So a table made longer begins with the shorter one.
    """

    def initialise(key, shape, dtype=jnp.float32):
        H, N, M = shape

        def entry(n, m):
            return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, n), m), (H,), dtype)

        over_columns = jax.vmap(entry, (None, 0))
        entries = jax.vmap(over_columns, (0, None))(jnp.arange(N), jnp.arange(M))
        return (std * jnp.moveaxis(entries, -1, 0)).astype(dtype)

    return initialise
