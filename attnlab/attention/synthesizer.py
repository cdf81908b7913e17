"""Synthesizer (arXiv 2005.00743): attention maps that are learned, random or predicted by the query alone.

Letters: B batch, T queries, S keys, H heads, K value heads, D and Dv head sizes, C channels, N table length, r rank;
t a query and j a key, as positions in their own document. softmax_j is taken over the visible keys, v_j the values.

    synth_random        o_t = sum_j softmax_j(R[h,t,j]) v_j                                         eq. 5
    synth_random_fact   o_t = sum_j softmax_j(R1[h,t] . R2[h,j]) v_j                                eq. 7
    synth_dense         o_t = sum_j softmax_j(relu(a_t) . w2[:,j] + b2[j]) v_j                      eq. 1-3
    synth_dense_fact    o_t = sum_j softmax_j(A_t[j mod a] B_t[j div a]) v_j                        eq. 6
    synth_mix           o_t = sum_j softmax_j((1 - g) q_t . k_j / sqrt(D) + g R[h,t,j]) v_j         section 3.3
                        g = sigmoid(alpha)

They serve as controls to arXiv 2510.11602: maps without dot products, or without any dependence on the input. A packed
document reads the table from its own first row on, and left padding takes no row. Options of all functions that are
not explained there: see `table_mixing.py`. Softmax and sums are float32 (float64 for float64 operands).
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnlab.attention import kv_cache
from attnlab.attention.heads import merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig, register
from attnlab.attention.softmax import SoftmaxAttention, SoftmaxConfig
from attnlab.attention.table_mixer import TableConfig, TableMixer, check_fits, check_length_option
from attnlab.attention.table_mixing import (
    IMPLEMENTATIONS,
    Blend,
    Product,
    check_heads,
    check_positions,
    mix,
    of_table,
    poison_rows,
    random_table,
    read_table,
    rows_of,
)
from kernels.forgetting import IMPLEMENTATIONS as SOFTMAX
from kernels.forgetting import forgetting_attention
from kernels.masks import Mask
from kernels.signatures import Array, Float, Int, checked

PAPER = "Synthesizer, arXiv 2005.00743"


# --- pure functions ----------------------------------------------------------------------------------------


@checked
def synth_random(
    table: Float[Array, "H N N"],
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    q_positions: Int[Array, "_ T"] | None = None,
    kv_positions: Int[Array, "_ S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"]:
    """Random synthesizer: softmax of a table of logits, the same for all inputs."""
    return of_table(table, v, True, mask, q_positions, kv_positions, implementation)


@checked
def synth_random_fact(
    row_factor: Float[Array, "H N r"],
    column_factor: Float[Array, "H N r"],
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    q_positions: Int[Array, "_ T"] | None = None,
    kv_positions: Int[Array, "_ S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"]:
    """Factorised random synthesizer: R = R1 R2^T is never formed, this is attention with tables for q and k."""
    S = v.shape[1]
    T = S if q_positions is None else q_positions.shape[1]
    N = row_factor.shape[1]
    check_positions(N, v.shape[0], T, S, q_positions, kv_positions)
    q, k = rows_of(row_factor, T, q_positions), rows_of(column_factor, S, kv_positions)
    return _attend(q, k, v, N, mask, q_positions, implementation)


def _attend(q, k, v, table_length, mask, q_positions, implementation):
    """Softmax attention of unscaled q [B or 1, T, H, D], k [B or 1, S, H, D]; the values keep their heads."""
    wide, (B, _, K, _), H = jnp.promote_types(jnp.float32, v.dtype), v.shape, q.shape[2]
    check_heads(H, K)
    q, k = (jnp.broadcast_to(x.astype(wide), (B, *x.shape[1:])) for x in (q, k))
    values = jnp.repeat(v.astype(wide), H // K, axis=2)
    o = forgetting_attention(q, k, values, mask=mask, scale=1.0, implementation=implementation)
    return poison_rows(o, q_positions, table_length, mask).astype(v.dtype)


@checked
def synth_dense(
    a: Float[Array, "B T H D"],
    w2: Float[Array, "H D N"],
    b2: Float[Array, "H N"],
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    q_positions: Int[Array, "_ T"] | None = None,
    kv_positions: Int[Array, "_ S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"]:
    """Dense synthesizer: the token predicts its row. This is attention with queries [relu(a), 1], keys [w2, b2]."""
    T, S, N = a.shape[1], v.shape[1], w2.shape[2]
    check_positions(N, v.shape[0], T, S, q_positions, kv_positions)
    wide = jnp.promote_types(jnp.float32, a.dtype)
    q = jax.nn.relu(a.astype(wide))
    q = jnp.concatenate([q, jnp.ones_like(q[..., :1])], axis=-1)
    keys = jnp.concatenate([w2, b2[:, None]], axis=1).swapaxes(1, 2)
    return _attend(q, rows_of(keys, S, kv_positions), v, N, mask, q_positions, implementation)


@checked
def synth_dense_fact(
    A: Float[Array, "B T H a"],
    B: Float[Array, "B T H b"],
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    q_positions: Int[Array, "_ T"] | None = None,
    kv_positions: Int[Array, "_ S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"]:
    """Factorised dense synthesizer: the token predicts two short rows, whose products fill a row of a b logits."""
    T, S, N = A.shape[1], v.shape[1], A.shape[-1] * B.shape[-1]
    check_positions(N, v.shape[0], T, S, q_positions, kv_positions)
    check_heads(A.shape[2], v.shape[2])
    wide = jnp.promote_types(jnp.float32, A.dtype)
    j = jnp.arange(S)[None] if kv_positions is None else kv_positions
    o = mix(Product(A.astype(wide), B.astype(wide), j), v, T, mask, True, implementation)
    return poison_rows(o, q_positions, N, mask).astype(v.dtype)


@checked
def synth_mix(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    table: Float[Array, "H N N"],
    alpha: Float[Array, ""],
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    q_positions: Int[Array, "_ T"] | None = None,
    kv_positions: Int[Array, "_ S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"]:
    """Mixture of dot product and random table, before the softmax."""
    T, S, N = q.shape[1], v.shape[1], table.shape[1]
    check_positions(N, v.shape[0], T, S, q_positions, kv_positions)
    check_heads(q.shape[2], v.shape[2])
    wide = jnp.promote_types(jnp.float32, q.dtype)
    entries = read_table(table, T, S, q_positions, kv_positions)
    scores = Blend(q.astype(wide), k.astype(wide), jax.nn.sigmoid(alpha.astype(wide)), entries)
    o = mix(scores, v, T, mask, True, implementation)
    return poison_rows(o, q_positions, N, mask).astype(v.dtype)


# --- options -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SynthRandomConfig(TableConfig):
    trainable: bool = True  # False: the table stays as drawn, of unit variance


@dataclasses.dataclass(frozen=True)
class SynthRandomFactConfig(SynthRandomConfig):
    rank: int = 8  # r

    def validate(self) -> None:
        super().validate()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")


@dataclasses.dataclass(frozen=True)
class SynthDenseFactConfig(TableConfig):
    factor_a: int = (
        0  # a and b, whose product covers max_length; 0: the smallest that does, once the other is given
    )
    factor_b: int = 0

    def validate(self) -> None:
        super().validate()
        a, b = self.factors
        if min(a, b) < 1 or a * b < self.max_length:
            raise ValueError(
                f"factor_a={a} times factor_b={b} does not cover max_length={self.max_length}; raise one of them"
            )

    @property
    def factors(self) -> tuple[int, int]:
        """a and b; without either, both are the root of max_length, rounded up."""
        N, a, b = self.max_length, self.factor_a, self.factor_b
        if not a and not b:
            a = b = math.isqrt(N - 1) + 1
        return a or math.ceil(N / b), b or math.ceil(N / a)


@dataclasses.dataclass(frozen=True)
class SynthMixConfig(SoftmaxConfig):
    max_length: int = 1024  # N: rows and columns of the table, and the longest input

    def validate(self) -> None:
        super().validate()
        check_length_option(self.max_length)
        for name, plain in (
            ("window", 0), ("alibi", False), ("log_n_length", 0), ("sink", "none"), ("adaptive_temperature", False)
        ):  # fmt: skip
            if getattr(self, name) != plain:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no form in synth_mix; leave it at {plain!r}"
                )


# --- modules -----------------------------------------------------------------------------------------------


@register("synth_random")
class SynthRandom(TableMixer):
    """Random synthesizer, its table trained (from std 0.02) or not (from std 1)."""

    Config: ClassVar[type[MixerConfig]] = SynthRandomConfig
    paper: ClassVar[str] = PAPER

    def setup_table(self):
        c = self.config
        self.logits = self.table(
            "table", 0.02 if c.trainable else 1.0, c.max_length, c.max_length, c.trainable
        )

    def mix(self, x, v, **options):
        return synth_random(self.logits, v, **options)


@register("synth_random_fact")
class SynthRandomFact(TableMixer):
    """Factorised random synthesizer; its logits have unit variance at first."""

    Config: ClassVar[type[MixerConfig]] = SynthRandomFactConfig
    paper: ClassVar[str] = PAPER
    implementations: ClassVar[tuple] = SOFTMAX

    def setup_table(self):
        c = self.config
        rest = (c.rank**-0.25, c.max_length, c.rank, c.trainable)
        self.rows, self.columns = self.table("row_factor", *rest), self.table("column_factor", *rest)

    def mix(self, x, v, **options):
        return synth_random_fact(self.rows, self.columns, v, **options)

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        rest = TableMixer.forward_flops(config, hidden_size, visible)
        return rest + 2 * config.num_heads * config.rank * visible


@register("synth_dense")
class SynthDense(TableMixer):
    """Dense synthesizer."""

    Config: ClassVar[type[MixerConfig]] = TableConfig
    paper: ClassVar[str] = PAPER
    implementations: ClassVar[tuple] = SOFTMAX

    def setup_table(self):
        c = self.config
        self.query = self.dense(c.num_heads * c.head_dim, "query", c.qkv_bias)
        self.logit_kernel = self.table("logit_kernel", self.init_std, c.head_dim, c.max_length)
        zeros = nn.initializers.zeros
        self.logit_bias = self.param("logit_bias", zeros, (c.num_heads, c.max_length), self.param_dtype)

    def mix(self, x, v, **options):
        a = split_heads(self.query(x), self.config.num_heads)
        return synth_dense(a, self.logit_kernel, self.logit_bias, v, **options)

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c, rest = config, TableMixer.forward_flops(config, hidden_size, visible)
        return rest + 2 * c.num_heads * (hidden_size * c.head_dim + (c.head_dim + 1) * visible)


@register("synth_dense_fact")
class SynthDenseFact(TableMixer):
    """Factorised dense synthesizer."""

    Config: ClassVar[type[MixerConfig]] = SynthDenseFactConfig
    paper: ClassVar[str] = PAPER

    def setup_table(self):
        c, (a, b) = self.config, self.config.factors
        self.factor_a = self.dense(c.num_heads * a, "factor_a")
        self.factor_b = self.dense(c.num_heads * b, "factor_b")

    def mix(self, x, v, **options):
        a, b = (split_heads(factor(x), self.config.num_heads) for factor in (self.factor_a, self.factor_b))
        return synth_dense_fact(a, b, v, **options)

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        rest = TableMixer.forward_flops(config, hidden_size, visible)
        return rest + 2 * hidden_size * config.num_heads * sum(config.factors)


@register("synth_mix")
class SynthMix(SoftmaxAttention):
    """Softmax attention whose logits are blended with a table's."""

    Config: ClassVar[type[MixerConfig]] = SynthMixConfig
    paper: ClassVar[str] = PAPER
    masks: ClassVar[tuple[str, ...]] = Mixer.masks
    implementations: ClassVar[tuple] = IMPLEMENTATIONS

    def setup(self):
        super().setup()
        c = self.config
        shape = (c.num_heads, c.max_length, c.max_length)
        self.table = self.param("table", random_table(0.02), shape, self.param_dtype)
        self.alpha = self.param("alpha", nn.initializers.zeros, (), self.param_dtype)

    def blend(self, q: Array, k: Array, v: Array, **options) -> Array:
        return self.out(merge_heads(synth_mix(q, k, self.table, self.alpha, v, **options)))

    def __call__(self, x, *, positions, segments=None, starts=None):
        check_fits(x.shape[1], self.config.max_length)
        mask = Mask(q_segments=segments, kv_segments=segments, starts=starts)
        name = self.config.implementation or None
        return self.blend(
            *self.heads(x, positions),
            mask=mask, q_positions=positions, kv_positions=positions, implementation=name,
        )  # fmt: skip

    def init_cache(self, batch, length, starts=None):
        check_fits(length, self.config.max_length)
        return super().init_cache(batch, length, starts)

    def prefill(self, x, cache):
        positions = kv_cache.new_positions(cache, x.shape[1])
        q, k, v = self.heads(x, positions)
        (k, v, _, mask), cache = kv_cache.extend(cache, k, v, None, None)
        y = self.blend(
            q,
            k,
            v,
            mask=mask,
            q_positions=positions,
            kv_positions=jnp.arange(v.shape[1])[None] - cache.starts[:, None],
            implementation=self.config.implementation or ("reference" if x.shape[1] == 1 else None),
        )
        return kv_cache.poison_overflow(y, cache), cache
