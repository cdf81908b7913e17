"""Attention whose exponential is a Taylor polynomial of order 2: the "Approximate" kind of Deconstructing Attention.

arXiv 2510.11602, equation 6 and appendix I. Letters: B batch, T queries, S keys, H query heads, K key/value heads,
D head size, Dv value size; i a query, j a key, c a channel.

    s_ij = q_i.k_j / sqrt(D)        d_ij = sum_c q_ic^2 k_jc^2 / (2 D)

    "full"             o_i = sum_j w_ij v_j / sum_j w_ij,   w_ij = 1 + s_ij + s_ij^2 / 2 >= 1/2
    "diag_joint"       likewise with w_ij = 1 + s_ij + d_ij, whose sum may be negative or small
    "diag_separate"    o_i = mean_j v_j + sum_j s_ij v_j / sum_j s_ij + sum_j d_ij v_j / sum_j d_ij     (eq. 14-17)

"full" is equation 6; the appendix describes the other two. Their denominators keep away from 0: |z| is at least 1e-6,
with no gradient where that is so. "full" is a row softmax of log w, so it streams like softmax attention.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.attention import kv_cache
from attnlab.attention.deconstructed import ProjectedMixer, ProjectionConfig, check_rotation, choose
from attnlab.attention.heads import merge_heads
from attnlab.attention.mixer import MixerConfig, register
from kernels import dispatch, masks
from kernels.dispatch import Implementation
from kernels.masks import Mask
from kernels.signatures import Array, Float, checked
from kernels.streaming import IMPLEMENTATIONS as STREAMING
from kernels.streaming import streaming_attention

FORMS = ("full", "diag_joint", "diag_separate")
LEAST = 1e-6  # of a denominator's absolute value
ROWS = 128  # query rows of a block of the diagonal forms


@dataclasses.dataclass(frozen=True)
class ApproxConfig(ProjectionConfig):
    approx_form: str = "full"  # of the Taylor polynomial; see `taylor.py`
    approx_rope: bool = True
    rope_theta: float = 1e6

    def validate(self) -> None:
        choose("approx_form", self.approx_form, FORMS)
        check_rotation(self.head_dim, self.approx_rope)


@dataclasses.dataclass(frozen=True)
class TaylorScore:
    """log(1 + s + s^2 / 2), the logit whose softmax has the "full" weights."""

    scale: float

    def __call__(self, x, rows, cols, of_rows, of_cols, extras):
        s = self.scale * x
        return jnp.log1p(s * (1 + s / 2))


@checked
def taylor_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    form: str = "full",
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"]:
    """Equation 6 in one of the three forms of the module's docstring, in memory linear in T and S.

    Query head h reads key/value head h // (H // K). All fields of the mask are honoured; a row without a visible key
    gives 0. Weights and sums are float32 (float64 for float64 operands).

    Args:
        form: "full", "diag_joint" or "diag_separate".
        implementation: "blockwise", "reference" (dense), or None for the platform's best.

    Returns [B, T, H, Dv] in q's dtype. ValueError for an unknown form or implementation, or shapes that do not fit.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; choose one of {', '.join(FORMS)}")
    if form == "full":
        score = TaylorScore(q.shape[-1] ** -0.5)
        return streaming_attention(score, q, k, v, mask=mask, implementation=implementation)
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    mask = masks.validate(mask, q.shape[0], q.shape[1], k.shape[1])
    return dispatch.over_mesh(
        lambda local: dispatch.run(DIAGONAL, implementation, local),
        Operands(q, k, v, mask, form),
        Operands("b.h.", "b.k.", "b.k.", dispatch.mask_layout(mask), form),
        "b.h.",
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """Of the diagonal forms; q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv]."""

    q: Array
    k: Array
    v: Array
    mask: Mask
    form: str = dataclasses.field(metadata={"static": True})


def diagonal_reference(operands: Operands) -> Array:
    """A diagonal form, all rows at once."""
    return _rows(operands, operands.q, jnp.arange(operands.q.shape[1])).astype(operands.q.dtype)


def diagonal_blockwise(operands: Operands) -> Array:
    """A diagonal form, a block of query rows after another, recomputed for the gradient: memory linear in T and S."""
    B, T, H, D = operands.q.shape
    size = min(ROWS, T)
    count = -(-T // size)
    q = jnp.pad(operands.q, ((0, 0), (0, count * size - T), (0, 0), (0, 0)))
    q = q.reshape(B, count, size, H, D).swapaxes(0, 1)

    @jax.checkpoint
    def block(operands, q, index):
        return _rows(operands, q, index * size + jnp.arange(size))

    _, o = jax.lax.scan(lambda _, part: (None, block(operands, *part)), None, (q, jnp.arange(count)))
    return o.swapaxes(0, 1).reshape(B, count * size, H, -1)[:, :T].astype(operands.q.dtype)


def _rows(operands: Operands, q: Array, rows: Array) -> Array:
    """o [B, R, H, Dv], in the accumulation dtype, of query rows q [B, R, H, D] with indices `rows` [R]."""
    (B, R, H, D), (_, S, K, _) = q.shape, operands.k.shape
    wide = jnp.promote_types(jnp.float32, q.dtype)
    q, k, v = (x.astype(wide) for x in (q, operands.k, operands.v))
    q = q.reshape(B, R, K, H // K, D)
    pairs = functools.partial(jnp.einsum, "brkgd,bskd->bkgrs", precision="highest")
    seen = masks.visible(operands.mask, rows, jnp.arange(S))[:, None, None]
    s = pairs(q, k) / jnp.sqrt(D).astype(wide)
    d = pairs(q * q, k * k) / (2 * D)
    terms = [1 + s + d] if operands.form == "diag_joint" else [jnp.ones_like(s), s, d]
    o = sum(_average(jnp.where(seen, w, 0), v) for w in terms)
    return o.reshape(B, R, H, -1)


def _average(w: Array, v: Array) -> Array:
    """sum_j w_ij v_j / sum_j w_ij: w [B, K, G, R, S], v [B, S, K, Dv] -> [B, R, K, G, Dv]."""
    z = away_from_zero(jnp.sum(w, axis=-1))
    return jnp.einsum("bkgrs,bskd->brkgd", w, v, precision="highest") / z.transpose(0, 3, 1, 2)[..., None]


def away_from_zero(z: Array) -> Array:
    """z where |z| >= 1e-6, else 1e-6 with the sign of z (+ for 0), which has no gradient."""
    return jnp.where(jnp.abs(z) >= LEAST, z, jnp.where(z >= 0, LEAST, -LEAST))


DIAGONAL = (Implementation("blockwise", diagonal_blockwise), Implementation("reference", diagonal_reference))
IMPLEMENTATIONS = STREAMING  # of the default form; the diagonal ones have the same names


class TaylorState(NamedTuple):
    """All that "full" needs of past keys, k times D^-1/2: z = sums over keys of 1, k, k k^T; n = of v, k v, k k^T v.

    z0 [B, K]; z1 [B, K, D]; z2 [B, K, D, D]; n0 [B, K, Dv]; n1 [B, K, D, Dv]; n2 [B, K, D, D, Dv].
    """

    z0: Array
    z1: Array
    z2: Array
    n0: Array
    n1: Array
    n2: Array


@checked
def taylor_state(k: Float[Array, "B S K D"], v: Float[Array, "B S K Dv"]) -> TaylorState:
    """The state after the keys k and their values; states of further keys add to it. At least float32."""
    wide = jnp.promote_types(jnp.float32, k.dtype)
    k, v = k.astype(wide) * k.shape[-1] ** -0.5, v.astype(wide)
    ones = jnp.ones((*k.shape[:3], 1), wide)
    total = functools.partial(jnp.einsum, precision="highest")

    def sums(v):
        return (
            total("bskv->bkv", v),
            total("bskd,bskv->bkdv", k, v),
            total("bskd,bske,bskv->bkdev", k, k, v),
        )

    z = (x[..., 0] for x in sums(ones))
    return TaylorState(*z, *sums(v))


@checked
def read_taylor_state(q: Float[Array, "B H D"], state: TaylorState) -> Float[Array, "B H Dv"]:
    """o = (n0 + q n1 + q q n2 / 2) / (z0 + q z1 + q q z2 / 2) for one query, not scaled, of each row and head."""
    B, H, D = q.shape
    K = state.z0.shape[1]
    q = q.reshape(B, K, H // K, D).astype(state.z0.dtype)
    total = functools.partial(jnp.einsum, precision="highest")

    def polynomial(x0, x1, x2):
        square = total("bkgd,bkge,bkdev->bkgv", q, q, x2)
        return x0[:, :, None] + total("bkgd,bkdv->bkgv", q, x1) + square / 2

    z = polynomial(*(x[..., None] for x in (state.z0, state.z1, state.z2)))
    return (polynomial(state.n0, state.n1, state.n2) / z).reshape(B, H, -1)


@register("approx")
class ApproxAttention(ProjectedMixer):
    """Equation 6 as a mixer, decoded from a `KVCache` (its constant state is larger below some thousand keys)."""

    Config: ClassVar[type[MixerConfig]] = ApproxConfig
    implementations: ClassVar[tuple] = IMPLEMENTATIONS

    def attend(self, q: Array, k: Array, v: Array, mask: Mask) -> Array:
        name = self.one_row_is_dense(q.shape[1])
        o = taylor_attention(q, k, v, form=self.config.approx_form, mask=mask, implementation=name)
        return self.out(merge_heads(o))

    def __call__(self, x, *, positions, segments=None, starts=None):
        q, k = self.queries_keys(x, positions, self.config.approx_rope)
        mask = Mask(q_segments=segments, kv_segments=segments, starts=starts)
        return self.attend(q, k, self.values(x), mask)

    def prefill(self, x, cache):
        q, k = self.queries_keys(x, kv_cache.new_positions(cache, x.shape[1]), self.config.approx_rope)
        (k, v, _, mask), cache = kv_cache.extend(cache, k, self.values(x), None, None)
        return kv_cache.poison_overflow(self.attend(q, k, v, mask), cache), cache

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        products = {"full": 2, "diag_joint": 3, "diag_separate": 5}[c.approx_form]
        projections = 2 * hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        return projections + products * 2 * c.num_heads * c.head_dim * visible
