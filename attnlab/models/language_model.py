"""A decoder language model: embedding, pre-norm blocks in any pattern of mixers, final norm, vocabulary head.

Letters: B batch, T length, C channels, V vocabulary, L layers. A pattern's period is compiled once and scanned. Layers
that read more than their input get it from the streams of `streams.py`.
"""

import functools
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.mixer import find_mixer
from attnlab.attention.norm import RMSNorm
from attnlab.models.blocks import Period, param_dtype
from attnlab.models.config import DTYPES, ModelConfig
from attnlab.models.placement import constrain_hidden
from attnlab.models.streams import AUXILIARY, MAPS, Context, poison_beyond, random_rows
from kernels.log_prob import TokenLogProbs, token_log_probs

Array = jax.Array


class LanguageModel(nn.Module):
    """tokens [B, T] -> logits [B, T, V]; `log_probs` without them; `init_cache` and `decode` for generation."""

    config: ModelConfig

    def setup(self):
        c = self.config
        if not c.vocab_size:
            raise ValueError(
                "model.vocab_size is 0; set it, or fill it with config.with_vocab(tokenizer.vocab_size)"
            )
        init = nn.initializers.normal(c.init_std)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.hidden_size), param_dtype(c))
        if "random" in c.auxiliary():
            self.random_stream = self._random_stream()
        if c.scan_layers:
            share = {
                "variable_axes": {"params": 0, "intermediates": 0, MAPS: 0},
                "split_rngs": {"params": True},
            }
            share["length"] = c.num_periods
            axes = {"__call__": (nn.broadcast, 0), "decode_stacked": (nn.broadcast, 0)}
            scanned = nn.scan(Period, methods={name: share | {"in_axes": axes[name]} for name in axes})
            self.layers = scanned(c)
        else:
            self.layers = [Period(c, place) for place in range(c.num_periods)]
        self.final_norm = RMSNorm((c.hidden_size,), c.norm_eps, param_dtype(c))
        if not c.tie_embeddings:
            self.head = self.param("head", init, (c.hidden_size, c.vocab_size), param_dtype(c))

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segments: Array | None = None,
        starts: Array | None = None,
        drop_layers: Collection[int] = (),
    ) -> Array:
        """tokens int32 [B, T] -> logits float32 [B, T, V].

        positions [B, T] restart with each document, default 0..T-1 from each row's start; segments [B, T] number the
        documents of a packed row (0: padding); starts [B] counts left padding. Mixers see nothing across either.
        drop_layers: numbers (from 1) of layers to replace by the identity, mixer and MLP.

        ValueError for more positions than the auxiliary streams have rows; NaN logits where only the device can tell.
        """
        return self.logits(
            self.hidden(
                tokens, positions=positions, segments=segments, starts=starts, drop_layers=drop_layers
            )
        )

    def hidden(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segments: Array | None = None,
        starts: Array | None = None,
        drop_layers: Collection[int] = (),
    ) -> Array:
        """What the last block leaves, [B, T, C]: the input of `logits` and `head_log_probs`. Arguments as above."""
        x = constrain_hidden(self.embed(tokens))
        streams, context = self._streams(x, positions, segments, starts)
        kept = kept_layers(self.config, drop_layers)
        if self.config.scan_layers:
            streams, _ = self.layers(streams, context, kept)
        else:
            for index, period in enumerate(self.layers):
                streams, _ = period(streams, context, None if kept is None else kept[index])
        x = constrain_hidden(streams["main"])
        if context.rows is None:
            return x
        return poison_beyond(x, context.rows, segments, self.config.streams.capacity(self.config.auxiliary()))

    def log_probs(
        self,
        tokens: Array,
        labels: Array,
        *,
        temperature: float = 1.0,
        return_entropy: bool = True,
        return_argmax: bool = False,
        implementation: str | None = None,
        **inputs,
    ) -> TokenLogProbs:
        """`head_log_probs` of `hidden(tokens, **inputs)`: what the model says about labels int32 [B, T].

        The logits [B, T, V] never exist.
        """
        return self.head_log_probs(
            self.hidden(tokens, **inputs),
            labels,
            temperature=temperature,
            return_entropy=return_entropy,
            return_argmax=return_argmax,
            implementation=implementation,
        )

    def _streams(self, x: Array, positions, segments, starts) -> tuple[dict[str, Array], Context]:
        """Layer 0 of all streams, and what blocks are told beside them."""
        c, T = self.config, x.shape[1]
        named, rows = c.auxiliary(), positions
        if positions is None:
            positions = jnp.arange(T, dtype=jnp.int32)[None]
            if starts is not None:
                positions = rows = positions - starts[:, None]
        streams = {"main": x}
        if named:
            used = capacity = c.streams.capacity(named)
            if rows is None or starts is not None:
                used = T
            if used > capacity:
                raise ValueError(
                    f"{T} positions are more than the {capacity} of the {' and '.join(named)} stream; shorten the "
                    "sequences, or train a model with more"
                )
            streams |= self._rows(named, 0, used)
        embeddings = streams if "embedding" in c.sources() else None
        return streams, Context(positions, segments, starts, rows if named else None, embeddings)

    def _random_stream(self) -> Array:
        """eps [N, C]: a parameter, so that checkpoints hold it, but a constant unless it is to be trained."""
        c, streams = self.config, self.config.streams
        streams.capacity(["random"])
        shape = (streams.length, c.hidden_size)
        init = functools.partial(random_rows, sigma=streams.sigma)
        if streams.train_eps:
            return self.param("random_stream", init, shape, param_dtype(c))
        return jax.lax.stop_gradient(self.param("frozen_random_stream", init, shape, param_dtype(c)))

    def _has_maps(self) -> bool:
        """Whether the maps of `compile_fixed_maps` are given, so that no auxiliary stream has to run."""
        return MAPS in self.variables

    def _rows(self, named: tuple[str, ...], start: int | Array, count: int) -> dict[str, Array]:
        """Rows start..start+count-1 of layer 0 of auxiliary streams, each [1, count, C]; none with maps."""
        if self._has_maps():
            return {}

        def part(array):
            return jax.lax.dynamic_slice_in_dim(array, start, count)

        rows = {}
        if "random" in named:
            rows["random"] = part(self.random_stream)[None].astype(DTYPES[self.config.dtype])
        if "text" in named:
            rows["text"] = self.embed(part(jnp.array(self.config.streams.fixed_tokens, jnp.int32))[None])
        return {name: constrain_hidden(x) for name, x in rows.items()}

    def embed(self, tokens: Array) -> Array:
        return jnp.take(self.embedding, tokens, axis=0).astype(DTYPES[self.config.dtype])

    def logits(self, x: Array) -> Array:
        """Final norm and head: x [B, T, C] -> [B, T, V], accumulated and returned in float32 (or float64)."""
        c = self.config
        x = self.final_norm(x)
        head = (self.embedding.T if c.tie_embeddings else self.head).astype(x.dtype)
        wide = jnp.promote_types(jnp.float32, x.dtype)
        logits = jnp.einsum("btc,cv->btv", x, head, preferred_element_type=wide)
        return c.logit_soft_cap * jnp.tanh(logits / c.logit_soft_cap) if c.logit_soft_cap else logits

    def head_log_probs(self, x: Array, labels: Array, **options) -> TokenLogProbs:
        """Final norm and head: x [B, T, C] -> what the `logits` say about labels int32 [B, T], without making them.

        Options are those of `kernels.log_prob.token_log_probs`; every field is [B, T] float32 (or float64).
        """
        c = self.config
        head, vocab_axis = (self.embedding, 0) if c.tie_embeddings else (self.head, 1)
        return token_log_probs(
            self.final_norm(x), head, labels, vocab_axis=vocab_axis, soft_cap=c.logit_soft_cap, **options
        )

    def init_cache(self, batch: int, length: int, starts: Array | None = None, fixed_maps: bool = False):
        """Empty caches of all layers for `length` positions; needs no parameters, so call it on the bare model.

        fixed_maps: for decoding with the maps of `compile_fixed_maps`.
        """
        c, named = self.config, self.config.auxiliary()
        if named and length > c.streams.capacity(named):
            raise ValueError(
                f"a cache of {length} positions is longer than the {c.streams.capacity(named)} of the "
                f"{' and '.join(named)} stream; generate fewer tokens, or train a model with more"
            )

        def caches(place):  # of a period of its own, with any parameters: caches depend on none
            period, sizes = Period(c, place, parent=None), (batch, length, starts, fixed_maps)
            return period.init_with_output(jax.random.key(0), *sizes, method="init_cache")[0]

        if not c.scan_layers:
            return tuple(caches(place) for place in range(c.num_periods))
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (c.num_periods, *leaf.shape)), caches(0))

    def decode(self, tokens: Array, cache, last_only: bool = False):
        """Append tokens [B, T] (T = 1: one step): logits [B, T, V] of the new positions, and the new cache.

        last_only gives [B, 1, V]: a long prompt's other logits would take T times the memory.
        """
        c, named = self.config, self.config.auxiliary()
        streams = {"main": self.embed(tokens)}
        if named:
            streams |= self._rows(named, self._length(cache), tokens.shape[1])
        embeddings = streams if "embedding" in c.sources() else None
        if c.scan_layers:
            numbers = jnp.arange(c.num_periods)
            (streams, cache), _ = self.layers.decode_stacked((streams, cache), embeddings, numbers)
        else:
            new = []
            for period, caches in zip(self.layers, cache, strict=True):
                streams, caches = period.decode(streams, embeddings, caches)
                new.append(caches)
            cache = tuple(new)
        x = streams["main"]
        return self.logits(x[:, -1:] if last_only else x), cache

    def _length(self, cache) -> Array:
        """Positions in the cache so far, as the layers that read an auxiliary stream count them."""
        names = [find_mixer(name).source for name, _ in self.config.layer_configs()]
        layer = next(index for index, source in enumerate(names) if source in AUXILIARY)
        period = cache if self.config.scan_layers else cache[0]
        return period[layer]["main"].length.reshape(-1)[0]


def kept_layers(config: ModelConfig, drop_layers: Collection[int]) -> np.ndarray | None:
    """bool [periods, layers of a period], False for dropped layers; None if there are none, ValueError for no layer."""
    if not drop_layers:
        return None
    wrong = sorted(set(drop_layers) - set(range(1, config.num_layers + 1)))
    if wrong:
        raise ValueError(f"drop_layers has {wrong[0]}, but layers are numbered 1 to {config.num_layers}")
    kept = ~np.isin(np.arange(1, config.num_layers + 1), list(drop_layers))
    return kept.reshape(config.num_periods, -1)


def compile_fixed_maps(config: ModelConfig, params: Any) -> dict[str, Any]:
    """The maps of all layers that read an auxiliary stream, as their queries and keys: {"fixed_maps": ...}.

    They are the same for every input, so inference needs the streams no more: the logits of
    `apply({"params": params} | maps, tokens)` and of `decode` (with `init_cache(..., fixed_maps=True)`) are those
    without `maps`. Jit it: what else the model would compute is left out then. ValueError for models without streams.
    """
    if not config.auxiliary():
        raise ValueError(f"no layer of {config.layers!r} has a fixed map; there is nothing to compile")
    tokens = jnp.zeros((1, config.streams.capacity(config.auxiliary())), jnp.int32)
    _, maps = LanguageModel(config).apply({"params": params}, tokens, mutable=[MAPS])
    return dict(maps)


def forward_flops(config: ModelConfig, length: int, *, causal: bool = True) -> float:
    """Matrix-product FLOPs a token of one forward pass over sequences of `length` tokens.

    A multiply-add counts two; the embedding look-up counts nothing, nor do auxiliary streams, which are one sequence
    more a batch. Causal attention counts the (length + 1) / 2 keys a query sees on average; causal=False counts all of
    them, which is what a dense implementation executes.
    """
    visible = (length + 1) / 2 if causal else length
    period = sum(
        find_mixer(n).forward_flops(o, config.hidden_size, visible) for n, o in config.layer_configs()
    )
    mlp = 2 * 3 * config.hidden_size * config.inner_size
    return config.num_periods * period + config.num_layers * mlp + 2 * config.hidden_size * config.vocab_size
