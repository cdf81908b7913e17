"""Streams: what flows through the blocks beside the input, for mixers whose queries and keys come from elsewhere.

A mixer names its source. "" is the layer's own input; "embedding" the layer-0 embedding e of the same stream; "random"
and "text" are auxiliary streams (Deconstructing Attention, arXiv 2510.11602, eq. 9-12): one sequence each, run through
the same blocks with the same weights as the input, so that the attention map is the same for every input but learned.

    X^(0) = eps (random) or E[t_s] (text),     X^(l) = Block_l(X^(l-1))

Letters: B batch, T length, C channels, N rows of an auxiliary stream, R the rows in use. A token at position p reads
row p. An auxiliary stream exists only in models with a layer that needs it. It passes every block, its own kind of
layer being ordinary attention to it, up to the last one that reads it (in a scan: in every period alike).
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
AUXILIARY = ("random", "text")
MAPS = "fixed_maps"  # the collection in which mixers store the queries and keys of a stream


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """The auxiliary streams; without effect on models none of whose layers needs one."""

    length: int = 0  # N of the random stream, and so the most positions; 0: the training sequences' length
    sigma: float = 0.02  # standard deviation of eps
    train_eps: bool = False  # train eps, which otherwise is a constant that checkpoints hold
    stop_grad_x: bool = False  # no gradient from maps to the layers that made them
    fixed_tokens: tuple[int, ...] = ()  # t_s, N of them; (): the first tokens of the training text

    def validate(self) -> None:
        """Raise ValueError with the offending value."""
        if self.length < 0 or self.sigma < 0:
            raise ValueError(
                f"model.streams.length={self.length} and sigma={self.sigma} must not be negative; use 0 or more"
            )
        wrong = [token for token in self.fixed_tokens if type(token) is not int or token < 0]
        if wrong:
            raise ValueError(
                f"model.streams.fixed_tokens holds {wrong[0]!r}, but tokens are integers from 0 on"
            )

    def capacity(self, names: Iterable[str]) -> int:
        """The most positions a model with the auxiliary streams `names` can have; ValueError where one is missing."""
        rows = {"random": self.length, "text": len(self.fixed_tokens)}
        field = {"random": "length is 0", "text": "fixed_tokens is empty"}
        for name in names:
            if not rows[name]:
                raise ValueError(
                    f"a layer needs the {name} stream, but model.streams.{field[name]}; set it, or train, which sets it"
                )
        return min(rows[name] for name in names)


@struct.dataclass
class Context:
    """What blocks are told beside the streams: positions [B or 1, T], segments [B, T], starts [B] of the main stream.

    rows [B or 1, T]: the row of the auxiliary streams that each token reads, None where token t reads row t.
    embeddings: the layer-0 embedding of every stream, by name, None where no layer needs them.
    """

    positions: Array
    segments: Array | None = None
    starts: Array | None = None
    rows: Array | None = None
    embeddings: dict[str, Array] | None = None


def live_streams(origins: Sequence[str]) -> list[tuple[str, ...]]:
    """For layers with these sources, the streams that each must advance: main, and what a later layer reads."""
    live, later = [], {"main"}
    for origin in reversed(origins):
        live.append(tuple(name for name in ("main", *AUXILIARY) if name in later))
        later = later | ({origin} & set(AUXILIARY))
    return live[::-1]


def random_rows(key: Array, shape: tuple[int, int], dtype, sigma: float) -> Array:
    """eps [N, C] ~ N(0, sigma^2); row p comes from `fold_in(key, p)`, so that a larger N only adds rows."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    return sigma * jax.vmap(lambda key: jax.random.normal(key, shape[1:], dtype))(keys)


def source_of(source: str, name: str, streams: dict[str, Array], embeddings, stop: bool) -> Array | None:
    """Where stream `name` takes the queries and keys of a layer with this `source`; None: from its own input."""
    if source == "embedding":
        return embeddings[name]
    if source == name or source not in streams:  # not there: the mixer has its map already
        return None
    return jax.lax.stop_gradient(streams[source]) if stop else streams[source]


def poison_beyond(y: Array, positions: Array, segments: Array | None, capacity: int) -> Array:
    """NaN, instead of a wrong answer, for tokens whose position [B or 1, T] no auxiliary row has; y [B, T, ...]."""
    beyond = positions >= capacity
    if segments is not None:
        beyond = beyond & (segments != 0)  # padding reads nothing
    return jnp.where(beyond.reshape(*beyond.shape, *(1,) * (y.ndim - 2)), jnp.nan, y)
