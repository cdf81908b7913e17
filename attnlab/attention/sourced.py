"""Attention whose queries and keys are not of the layer's input: three kinds of arXiv 2510.11602, equations 9-13.

Letters: B batch, T queries, S keys, R rows of the source, H query heads, K key/value heads, D head size, C channels,
h a layer's normed input, g this layer's norm, X another stream of the model (`models/streams.py`).

    rndemb_qk      q, k = g(X) W_q, g(X) W_k    X: random vectors, one a position, that went through the layers below
    fixedseq_qk    likewise                     X: a fixed text that went through the layers below
    staticemb_qk   q, k = g(e) W_q, g(e) W_k    e: the layer-0 embedding of the same tokens

    o_i = sum_{j<=i} softmax_j(q_i.k_j / sqrt(D)) v_j,    v = h W_v            rotated q, k

The first two have the same map for every input, so its scores are computed once a batch. Without a source all three
are softmax attention of their own input: what such a layer is to the stream that is its source.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from attnlab.attention import kv_cache
from attnlab.attention.deconstructed import ProjectedMixer, ProjectionConfig, check_rotation, choose
from attnlab.attention.heads import merge_heads
from attnlab.attention.kv_cache import KVCache
from attnlab.attention.mixer import MixerConfig, register
from attnlab.attention.norm import RMSNorm
from attnlab.attention.softmax import softmax_attention
from kernels import dispatch
from kernels.forgetting import IMPLEMENTATIONS, forgetting_attention
from kernels.masks import Mask
from kernels.signatures import Array, Float, Int, checked

MAPS = "fixed_maps"  # the collection of stored queries and keys
STATIC_NORMS = ("layer", "none", "own")


@dataclasses.dataclass(frozen=True)
class FixedMapConfig(ProjectionConfig):
    rope: bool = True
    rope_theta: float = 1e6

    def validate(self) -> None:
        check_rotation(self.head_dim, self.rope)


@dataclasses.dataclass(frozen=True)
class StaticEmbeddingConfig(FixedMapConfig):
    static_norm: str = "layer"  # g: this layer's norm, "none", or a norm of its "own"

    def validate(self) -> None:
        super().validate()
        choose("static_norm", self.static_norm, STATIC_NORMS)


@checked
def shared_qk_attention(
    q: Float[Array, "1 T H D"],
    k: Float[Array, "1 S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    return_lse: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Softmax attention with one map for the whole batch (eq. 10, 12): scores are computed once.

    The values of all batch rows lie side by side as columns, so this is attention with B Dv value channels, and the
    gradients of q and k are sums over the batch. The mask must be the same for all rows: no segments, starts or
    lengths. Returns [B, T, H, Dv] in v's dtype, with return_lse also lse [1, T, H]. ValueError for other masks.

    Under `jax.set_mesh` every device computes the map for its share of the batch.
    """
    for name in ("q_segments", "starts", "lengths"):
        if getattr(mask, name) is not None:
            raise ValueError(
                f"mask.{name} differs between batch rows, which share one map; repeat q and k instead"
            )

    def columns(operands):
        q, k, v, mask = operands
        B, S, K, Dv = v.shape
        side = v.transpose(1, 2, 0, 3).reshape(1, S, K, B * Dv)
        o, lse = forgetting_attention(q, k, side, mask=mask, return_lse=True, implementation=implementation)
        return o.reshape(*o.shape[1:3], B, Dv).transpose(2, 0, 1, 3).astype(v.dtype), lse

    layout = ("..h.", "..k.", "b.k.", dataclasses.replace(mask, q_offset=""))
    o, lse = dispatch.over_mesh(columns, (q, k, v, mask), layout, ("b.h.", "..h"))
    return (o, lse) if return_lse else o


@checked
def take_rows(x: Float[Array, "1 R H D"], rows: Int[Array, "B T"]) -> Float[Array, "B T H D"]:
    """Each token's row of a shared stream's heads; rows out of range take the nearest one."""
    return jnp.take(x[0], jnp.clip(rows, 0, x.shape[1] - 1), axis=0)


@struct.dataclass
class SharedMapCache(KVCache):
    """A `KVCache` whose keys [1, S, K, D] all rows share; query [1, S, H, D] where rows have left padding."""

    query: Array | None = None


class SourcedAttention(ProjectedMixer):
    """Softmax attention with queries and keys of another stream, already normed; without one, of its own input."""

    implementations: ClassVar[tuple] = IMPLEMENTATIONS
    norms_source: ClassVar[bool] = True  # whether the block's norm is to be applied to the stream

    def attend(self, q: Array, k: Array, v: Array, mask: Mask) -> Array:
        o = softmax_attention(q, k, v, mask=mask, implementation=self.one_row_is_dense(q.shape[1]))
        return self.out(merge_heads(o))

    def __call__(self, x, *, positions, segments=None, starts=None, source=None):
        q, k = self.queries_keys(x if source is None else source, positions, self.config.rope)
        mask = Mask(q_segments=segments, kv_segments=segments, starts=starts)
        return self.attend(q, k, self.values(x), mask)

    def prefill(self, x, cache, source=None):
        positions = kv_cache.new_positions(cache, x.shape[1])
        q, k = self.queries_keys(x if source is None else source, positions, self.config.rope)
        (k, v, _, mask), cache = kv_cache.extend(cache, k, self.values(x), None, None)
        return kv_cache.poison_overflow(self.attend(q, k, v, mask), cache), cache

    def step(self, x, cache, source=None):
        if x.shape[1] != 1:
            raise ValueError(f"step takes one token, got {x.shape[1]}; use prefill")
        return self.prefill(x, cache, source)


@register("staticemb_qk")
class StaticEmbeddingAttention(SourcedAttention):
    """Equation 13: queries and keys of the tokens' layer-0 embeddings."""

    Config: ClassVar[type[MixerConfig]] = StaticEmbeddingConfig
    source: ClassVar[str] = "embedding"

    def setup(self):
        super().setup()
        if self.config.static_norm == "own":
            self.source_norm = RMSNorm((self.hidden_size,), self.norm_eps, self.param_dtype)

    @property
    def norms_source(self) -> bool:
        return self.config.static_norm == "layer"

    def queries_keys(self, x, positions, rope):
        x = self.source_norm(x) if self.config.static_norm == "own" else x
        return super().queries_keys(x, positions, rope)


class FixedMapAttention(SourcedAttention):
    """Equations 9-12: queries and keys of one sequence, the same for every input, so that the map is shared.

    source [1, R, C] has the rows of positions 0..R-1. Token t reads row t, or rows[b, t] where that is given; without
    rows, segments and starts the scores are computed once for the whole batch. Queries and keys are stored in the
    collection `fixed_maps` where that is mutable, and taken from there, in the place of a source, where it is given.
    """

    Config: ClassVar[type[MixerConfig]] = FixedMapConfig

    def __call__(self, x, *, positions, segments=None, starts=None, source=None, rows=None):
        if source is None and not self.compiled:
            return super().__call__(x, positions=positions, segments=segments, starts=starts)
        q, k = self.map_rows(source, 0, x.shape[1] if rows is None else None)
        v = self.values(x)
        if rows is None and segments is None and starts is None:
            return self.attend_shared(q, k, v, Mask())
        if rows is not None:
            q, k = take_rows(q, rows), take_rows(k, rows)
        q, k = (jnp.broadcast_to(heads, (x.shape[0], *heads.shape[1:])) for heads in (q, k))
        return self.attend(q, k, v, Mask(q_segments=segments, kv_segments=segments, starts=starts))

    @property
    def compiled(self) -> bool:
        """Whether queries and keys are at hand."""
        return self.has_variable(MAPS, "query")

    def map_rows(self, source: Array | None, first: int | Array, count: int | None) -> tuple[Array, Array]:
        """q [1, R, H, D] and k [1, R, K, D] of a source from `first` on, or `count` (None: all) stored ones."""
        if source is not None:
            positions = first + jnp.arange(source.shape[1], dtype=jnp.int32)[None]
            q, k = self.queries_keys(source, positions, self.config.rope)
            if self.is_mutable_collection(MAPS) and not self.is_initializing():
                self.put_variable(MAPS, "query", q)
                self.put_variable(MAPS, "key", k)
            return q, k
        stored = (self.get_variable(MAPS, name) for name in ("query", "key"))
        if count is None:
            return tuple(stored)
        return tuple(jax.lax.dynamic_slice_in_dim(x, first, count, axis=1) for x in stored)

    def attend_shared(self, q: Array, k: Array, v: Array, mask: Mask) -> Array:
        o = shared_qk_attention(q, k, v, mask=mask, implementation=self.one_row_is_dense(q.shape[1]))
        return self.out(merge_heads(o))

    def init_cache(self, batch, length, starts=None, shared=False):
        """shared: for a stream that gets its queries and keys from another one."""
        own = super().init_cache(batch, length, starts)
        if not shared:
            return own
        c = self.config
        fields = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        fields["key"] = own.key[:1]
        padded = starts is not None
        query = jnp.zeros((1, length, c.num_heads, c.head_dim), self.dtype) if padded else None
        return SharedMapCache(**fields, query=query)

    def prefill(self, x, cache, source=None):
        if source is None and not self.compiled:
            return super().prefill(x, cache)
        before, T = cache.length, x.shape[1]
        q, k = self.map_rows(source, before, T)
        (k, v, _, mask), cache = kv_cache.extend(cache, k, self.values(x), None, None)
        if cache.query is None:
            y = self.attend_shared(q, k, v, dataclasses.replace(mask, starts=None))
        else:
            query = jax.lax.dynamic_update_slice_in_dim(
                cache.query, q.astype(cache.query.dtype), before, axis=1
            )
            cache = cache.replace(query=query)
            slots = jnp.arange(k.shape[1], dtype=jnp.int32)[None] - cache.starts[:, None]
            rows = before + jnp.arange(T, dtype=jnp.int32)[None] - cache.starts[:, None]
            y = self.attend(take_rows(query, rows), take_rows(k, slots), v, mask)
        return kv_cache.poison_overflow(y, cache), cache

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        """Without the projections to queries and keys, which are done once for the whole batch."""
        once = 2 * hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
        return ProjectedMixer.forward_flops(config, hidden_size, visible) - once


@register("rndemb_qk")
class RandomEmbeddingAttention(FixedMapAttention):
    """Queries and keys of the random stream (eq. 9-10)."""

    source: ClassVar[str] = "random"


@register("fixedseq_qk")
class FixedSequenceAttention(FixedMapAttention):
    """Queries and keys of the text stream (eq. 11-12)."""

    source: ClassVar[str] = "text"
