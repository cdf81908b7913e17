"""The pre-norm block around any mixer: h = x + mixer(norm(x)); y = h + MLP(norm(h)).

Letters: B batch, T length, C channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnlab.attention.mixer import Mixer, MixerConfig, find_mixer
from attnlab.attention.norm import RMSNorm
from attnlab.models.config import DTYPES, ModelConfig
from attnlab.models.mlp import SwiGLU

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

    def _mix(self, x, positions, segments, starts):
        return self.mixer(self.mixer_norm(x), positions=positions, segments=segments, starts=starts)

    def __call__(self, x: Array, positions: Array, segments: Array | None, starts: Array | None) -> Array:
        c = self.config
        mix = nn.remat(Block._mix, prevent_cse=not c.scan_layers) if c.remat == "parts" else Block._mix
        h = x + mix(self, x, positions, segments, starts)
        return h + self.mlp(self.mlp_norm(h))

    def init_cache(self, batch: int, length: int, starts: Array | None):
        return self.mixer.init_cache(batch, length, starts)

    def decode(self, x: Array, cache):
        append = self.mixer.step if x.shape[1] == 1 else self.mixer.prefill
        y, cache = append(self.mixer_norm(x), cache)
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
    """One period of the layer pattern, with the carry/scan signature `nn.scan` wants."""

    config: ModelConfig

    def setup(self):
        block = block_remat(self.config)
        self.blocks = [block(name, options, self.config) for name, options in self.config.layer_configs()]

    def __call__(self, x, positions, segments, starts):
        for block in self.blocks:
            x = block(x, positions, segments, starts)
        return x, None

    def init_cache(self, batch, length, starts):
        return tuple(block.init_cache(batch, length, starts) for block in self.blocks)

    def decode(self, x, caches):
        new = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.decode(x, cache)
            new.append(cache)
        return x, tuple(new)
