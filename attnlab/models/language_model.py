"""A decoder language model: embedding, pre-norm blocks in any pattern of mixers, final norm, vocabulary head.

Letters: B batch, T length, C channels, V vocabulary, L layers. A pattern's period is compiled once and scanned.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnlab.attention.mixer import find_mixer
from attnlab.attention.norm import RMSNorm
from attnlab.models.blocks import Period, param_dtype
from attnlab.models.config import DTYPES, ModelConfig
from attnlab.models.placement import constrain_hidden

Array = jax.Array


class LanguageModel(nn.Module):
    """tokens [B, T] -> logits [B, T, V]; `init_cache` and `decode` for generation."""

    config: ModelConfig

    def setup(self):
        c = self.config
        if not c.vocab_size:
            raise ValueError(
                "model.vocab_size is 0; set it, or fill it with config.with_vocab(tokenizer.vocab_size)"
            )
        init = nn.initializers.normal(c.init_std)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.hidden_size), param_dtype(c))
        if c.scan_layers:
            share = {"variable_axes": {"params": 0, "intermediates": 0}, "split_rngs": {"params": True}}
            share["length"] = c.num_periods
            methods = {"__call__": share | {"in_axes": nn.broadcast}, "decode": share | {"in_axes": 0}}
            scanned = nn.scan(Period, methods=methods)
            self.layers = scanned(c)
        else:
            self.layers = [Period(c) for _ in range(c.num_periods)]
        self.final_norm = RMSNorm((c.hidden_size,), c.norm_eps, param_dtype(c))
        if not c.tie_embeddings:
            self.head = self.param("head", init, (c.hidden_size, c.vocab_size), param_dtype(c))

    def __call__(
        self, tokens: Array, *, positions: Array | None = None, segments: Array | None = None, starts=None
    ) -> Array:
        """tokens int32 [B, T] -> logits float32 [B, T, V].

        positions [B, T] restart with each document, default 0..T-1 from each row's start; segments [B, T] number the
        documents of a packed row (0: padding); starts [B] counts left padding. Mixers see nothing across either.
        """
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            positions = positions if starts is None else positions - starts[:, None]
        x = constrain_hidden(self.embed(tokens))
        if self.config.scan_layers:
            x, _ = self.layers(x, positions, segments, starts)
        else:
            for period in self.layers:
                x, _ = period(x, positions, segments, starts)
        return self.logits(constrain_hidden(x))

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

    def init_cache(self, batch: int, length: int, starts: Array | None = None):
        """Empty caches of all layers for `length` positions; needs no parameters, so call it on the bare model."""
        period = Period(self.config, parent=None)  # of its own: caches need no parameters
        one = period.apply({}, batch, length, starts, method="init_cache")
        if not self.config.scan_layers:
            return (one,) * self.config.num_periods
        count = self.config.num_periods
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), one)

    def decode(self, tokens: Array, cache, last_only: bool = False):
        """Append tokens [B, T] (T = 1: one step): logits [B, T, V] of the new positions, and the new cache.

        last_only gives [B, 1, V]: a long prompt's other logits would take T times the memory.
        """
        x = self.embed(tokens)
        if self.config.scan_layers:
            x, cache = self.layers.decode(x, cache)
        else:
            new = []
            for period, caches in zip(self.layers, cache, strict=True):
                x, caches = period.decode(x, caches)
                new.append(caches)
            cache = tuple(new)
        return self.logits(x[:, -1:] if last_only else x), cache


def forward_flops(config: ModelConfig, length: int, *, causal: bool = True) -> float:
    """Matrix-product FLOPs a token of one forward pass over sequences of `length` tokens.

    A multiply-add counts two; the embedding look-up counts nothing. Causal attention counts the (length + 1) / 2 keys
    a query sees on average; causal=False counts all of them, which is what a dense implementation executes.
    """
    visible = (length + 1) / 2 if causal else length
    period = sum(
        find_mixer(n).forward_flops(o, config.hidden_size, visible) for n, o in config.layer_configs()
    )
    mlp = 2 * 3 * config.hidden_size * config.inner_size
    return config.num_periods * period + config.num_layers * mlp + 2 * config.hidden_size * config.vocab_size
