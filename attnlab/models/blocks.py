"""The pre-norm block around any mixer: h = x + mixer(norm(x)); y = h + MLP(norm(h)).

Letters: B batch, T length, C channels, R rows of another stream (see `streams.py`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.mixer import Mixer, MixerConfig, find_mixer
from attnlab.attention.norm import RMSNorm
from attnlab.models.config import DTYPES, ModelConfig
from attnlab.models.mlp import SwiGLU
from attnlab.models.streams import AUXILIARY, Context, live_streams, source_of

Array = jax.Array


def make_mixer(name: str, options: MixerConfig, config: ModelConfig, module_name: str | None = None) -> Mixer:
    """The mixer registered as `name` with the model's width, init and dtypes."""
    return find_mixer(name)(
        config=options,
        hidden_size=config.hidden_size,
        norm_eps=config.norm_eps,
        init_std=config.init_std,
        dtype=DTYPES[config.dtype],
        param_dtype=param_dtype(config),
        name=module_name,
    )


def param_dtype(config: ModelConfig):
    """Parameters are float32 (float64 in float64 models): optimisers need the precision."""
    return jnp.promote_types(jnp.float32, DTYPES[config.dtype])


class Block(nn.Module):
    """One layer. All three methods share the parameters; `remat` wraps the two halves when config says "parts"."""

    mixer_name: str
    options: MixerConfig
    config: ModelConfig

    def setup(self):
        c = self.config
        parts = c.remat == "parts"
        self.mixer_norm = RMSNorm((c.hidden_size,), c.norm_eps, param_dtype(c))
        self.mlp_norm = RMSNorm((c.hidden_size,), c.norm_eps, param_dtype(c))
        self.mixer = make_mixer(self.mixer_name, self.options, c)
        mlp = nn.remat(SwiGLU, prevent_cse=not c.scan_layers) if parts else SwiGLU
        self.mlp = mlp(c.inner_size, c.init_std, DTYPES[c.dtype], param_dtype(c))

    def _mix(self, x, positions, segments, starts, source, rows):
        extra = self._read(source) | ({} if rows is None else {"rows": rows})
        return self.mixer(self.mixer_norm(x), positions=positions, segments=segments, starts=starts, **extra)

    def _read(self, source: Array | None) -> dict[str, Array]:
        """Another stream as the mixer gets it: through this layer's norm, unless the mixer says otherwise."""
        if source is None:
            return {}
        return {"source": self.mixer_norm(source) if self.mixer.norms_source else source}

    def __call__(
        self,
        x: Array,
        positions: Array,
        segments: Array | None = None,
        starts: Array | None = None,
        source: Array | None = None,
        rows: Array | None = None,
    ) -> Array:
        """x [B, T, C] -> [B, T, C]; source [B or 1, R, C] and rows [B or 1, T] only for mixers that have a source."""
        c = self.config
        mix = nn.remat(Block._mix, prevent_cse=not c.scan_layers) if c.remat == "parts" else Block._mix
        h = x + mix(self, x, positions, segments, starts, source, rows)
        return h + self.mlp(self.mlp_norm(h))

    def init_cache(self, batch: int, length: int, starts: Array | None, shared: bool = False):
        return self.mixer.init_cache(batch, length, starts, **({"shared": True} if shared else {}))

    def decode(self, x: Array, cache, source: Array | None = None):
        append = self.mixer.step if x.shape[1] == 1 else self.mixer.prefill
        y, cache = append(self.mixer_norm(x), cache, **self._read(source))
        h = x + y
        return h + self.mlp(self.mlp_norm(h)), cache


def block_remat(config: ModelConfig):
    """The Block class, wrapped to recompute as config.remat says ("parts" is handled inside the block)."""
    policies = {"block": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    if config.remat not in policies:
        return Block
    return nn.remat(
        Block, prevent_cse=not config.scan_layers, policy=policies[config.remat], methods=["__call__"]
    )


class Period(nn.Module):
    """One period of the layer pattern, with the carry/scan signature `nn.scan` wants; the carry is all streams."""

    config: ModelConfig
    place: int = 0  # of this period in the model; scanned periods are all like the first

    def setup(self):
        block = block_remat(self.config)
        self.blocks = [block(name, options, self.config) for name, options in self.config.layer_configs()]

    def _layers(self) -> list[tuple[Block, str, tuple[str, ...]]]:
        """(block, the source of its mixer, the streams it advances) of every layer."""
        origins = [find_mixer(name).source for name, _ in self.config.layer_configs()]
        live = live_streams(origins * self.config.num_periods)[self.place * len(origins) :]
        return list(zip(self.blocks, origins, live, strict=False))

    def _source(self, origin: str, name: str, streams, embeddings) -> Array | None:
        return source_of(origin, name, streams, embeddings, self.config.streams.stop_grad_x)

    def __call__(self, streams: dict[str, Array], context: Context, kept: Array | None = None):
        """Streams by name, each [B or 1, T or R, C]; kept, bool [layers], False where a layer is the identity."""
        for index, (block, origin, live) in enumerate(self._layers()):
            keep = True if kept is None else kept[index]
            if isinstance(keep, np.bool_) and not keep:
                continue
            new = {
                name: self._apply(block, origin, name, streams, context) for name in live if name in streams
            }
            if isinstance(keep, jax.Array):
                new = {name: jnp.where(keep, x, streams[name]) for name, x in new.items()}
            streams = streams | new
        return streams, None

    def _apply(self, block: Block, origin: str, name: str, streams, context: Context) -> Array:
        x, source = streams[name], self._source(origin, name, streams, context.embeddings)
        if name != "main":
            return block(x, jnp.arange(x.shape[1], dtype=jnp.int32)[None], source=source)
        rows = context.rows if origin in AUXILIARY else None
        return block(x, context.positions, context.segments, context.starts, source, rows)

    def init_cache(self, batch: int, length: int, starts: Array | None, fixed_maps: bool = False):
        """For every block the caches of the streams it advances, by name; with fixed maps of the main one alone."""

        def cache(block, origin, name):
            shared = origin in AUXILIARY and origin != name
            sizes = (batch, length, starts) if name == "main" else (1, length, None)
            return block.init_cache(*sizes, shared)

        return tuple(
            {name: cache(block, origin, name) for name in live} for block, origin, live in self._layers()
        )

    def decode(self, streams: dict[str, Array], embeddings: dict[str, Array] | None, caches):
        """The next tokens or rows of all streams, in lock step."""
        after = []
        for (block, origin, live), cache in zip(self._layers(), caches, strict=True):
            done = {
                name: block.decode(
                    streams[name], cache[name], self._source(origin, name, streams, embeddings)
                )
                for name in live
                if name in streams
            }
            streams = streams | {name: x for name, (x, _) in done.items()}
            after.append({name: new for name, (_, new) in done.items()})
        return streams, tuple(after)

    def decode_stacked(self, carry, embeddings: dict[str, Array] | None, number: Array):
        """`decode` of period `number` in a scan: (streams, caches of all periods, stacked) -> the same and None.

        The caches are carried, as a scan that takes and returns them would copy all of them for each token.
        """
        streams, stacked = carry
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), stacked)
        streams, after = self.decode(streams, embeddings, own)
        # With fixed maps the auxiliary streams stay where they are.
        own = tuple(old | new for old, new in zip(own, after, strict=True))

        def put(leaf, new):
            return jax.lax.dynamic_update_index_in_dim(leaf, new, number, 0)

        return (streams, jax.tree.map(put, stacked, own)), None
