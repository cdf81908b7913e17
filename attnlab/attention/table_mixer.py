"""What mixers with a table over positions share: options, values and output, a cache of values alone, positions.

Letters: B batch, T queries, S keys, H heads, K value heads, D head size, C channels, N table length. A packed document
reads the table from its own first row on, and left padding takes no row.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnlab.attention import kv_cache
from attnlab.attention.heads import merge_heads, split_heads
from attnlab.attention.mixer import Mixer, MixerConfig
from attnlab.attention.table_mixing import IMPLEMENTATIONS, random_table
from kernels.masks import Mask

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TableConfig(MixerConfig):
    max_length: int = 1024  # N: rows and columns of the table, and the longest input
    qkv_bias: bool = False

    def validate(self) -> None:
        check_length_option(self.max_length)


def check_length_option(max_length: int) -> None:
    """ValueError unless a table can have this length."""
    if max_length < 1:
        raise ValueError(
            f"max_length={max_length} must be at least 1, the longest input the table is to serve"
        )


def check_fits(length: int, max_length: int) -> None:
    """ValueError if an input or a cache is longer than the table."""
    if length > max_length:
        raise ValueError(f"{length} positions do not fit max_length={max_length}; raise max_length")


class TableMixer(Mixer):
    """What mixers with a table share: values, the output projection, a cache of values alone, positions."""

    implementations: ClassVar[tuple] = IMPLEMENTATIONS

    def setup(self):
        c = self.config
        self.value = self.dense(c.num_kv_heads * c.head_dim, "value", c.qkv_bias)
        self.out = self.dense(self.hidden_size, "out")
        self.setup_table()

    def setup_table(self) -> None:
        """The mixer's own parameters."""
        raise NotImplementedError

    def table(self, name: str, std: float, rows: int, columns: int, trainable: bool = True) -> Array:
        """Parameter [H, rows, columns]; one that is not trained is named frozen_* and a constant to gradients."""
        shape = (self.config.num_heads, rows, columns)
        prefix = "" if trainable else "frozen_"
        table = self.param(prefix + name, random_table(std), shape, self.param_dtype)
        return table if trainable else jax.lax.stop_gradient(table)

    def mix(self, x: Array, v: Array, **options) -> Array:
        """o [B, T, H, D] of the queries' x [B, T, C] and the values v [B, S, K, D]; options go to the pure function."""
        raise NotImplementedError

    def readout(self, x: Array, o: Array) -> Array:
        return self.out(merge_heads(o))

    def values(self, x: Array) -> Array:
        return split_heads(self.value(x), self.config.num_kv_heads)

    def __call__(self, x, *, positions, segments=None, starts=None):
        check_fits(x.shape[1], self.config.max_length)
        mask = Mask(q_segments=segments, kv_segments=segments, starts=starts)
        name = self.config.implementation or None
        o = self.mix(
            x, self.values(x), mask=mask, q_positions=positions, kv_positions=positions, implementation=name
        )
        return self.readout(x, o)

    def init_cache(self, batch, length, starts=None):
        check_fits(length, self.config.max_length)
        heads, size = self.value_shape()
        cache = kv_cache.init_cache(batch, length, heads, size, self.dtype, starts=starts)
        return cache.replace(key=cache.key[..., :0])  # keys are positions: they need no room

    def value_shape(self) -> tuple[int, int]:
        return self.config.num_kv_heads, self.config.head_dim

    def prefill(self, x, cache):
        v, q_positions = self.values(x), kv_cache.new_positions(cache, x.shape[1])
        (_, v, _, mask), cache = kv_cache.extend(cache, v[..., :0], v, None, None)
        o = self.mix(
            x,
            v,
            mask=mask,
            q_positions=q_positions,
            kv_positions=jnp.arange(v.shape[1])[None] - cache.starts[:, None],
            implementation=self.config.implementation or ("reference" if x.shape[1] == 1 else None),
        )
        return kv_cache.poison_overflow(self.readout(x, o), cache), cache

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        c = config
        projections = 2 * hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
        return projections + 2 * c.num_heads * c.head_dim * visible

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        return length * config.num_kv_heads * config.head_dim
