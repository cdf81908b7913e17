"""What every attention mechanism must offer to become a layer, and the names under which layers find it.

Letters: B batch, T length, C channels, H heads.

A mixer is a Flax module (B, T, C) -> (B, T, C) with
- the parallel form `mixer(x, positions=, segments=, starts=)`, used for training,
- decoding: `init_cache`, `prefill` (any number of tokens, also into a filled cache) and `step` (one token),
  with caches that are plain pytrees of static shape,
- `forward_flops` and `state_size`, the cost formulas behind the reported utilisation and the table of mechanisms.
`prefill` and `step` after each other give the same numbers as the parallel form; the tests hold every mixer to it.
"""

import ast
import dataclasses
import difflib
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.dispatch import Implementation

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """Sizes all mixers share; 0 means: the model's value."""

    num_heads: int = 0  # H; 0: model.num_heads
    num_kv_heads: int = 0  # K, grouped-query attention when below H; 0: model.num_kv_heads
    head_dim: int = 0  # D; 0: model.head_dim

    implementation: str = ""  # of the kernel, by name; "": the best for the platform compiled for

    def resolve(self, num_heads: int, num_kv_heads: int, head_dim: int, hidden_size: int) -> "MixerConfig":
        """Fill the zeros from the model's sizes and check the result; returns a config without zeros."""
        heads = self.num_heads or num_heads
        kv_heads = self.num_kv_heads or num_kv_heads or heads
        dim = self.head_dim or head_dim or hidden_size // heads
        if heads % kv_heads:
            raise ValueError(
                f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}; choose a divisor"
            )
        if not (self.head_dim or head_dim) and hidden_size % heads:
            raise ValueError(
                f"hidden_size={hidden_size} is not a multiple of num_heads={heads}; set head_dim"
            )
        config = dataclasses.replace(self, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
        config.validate()
        return config

    def validate(self) -> None:
        """Raise ValueError, with the values, for options that do not go together."""


class Mixer(nn.Module):
    """Base of all mixers: fields every one of them has, and the contract's methods."""

    config: Any  # a resolved MixerConfig
    hidden_size: int  # C
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32  # compute dtype; parameters are param_dtype
    param_dtype: jnp.dtype = jnp.float32

    Config: ClassVar[type[MixerConfig]] = MixerConfig
    paper: ClassVar[str] = ""  # short name and arXiv number
    masks: ClassVar[tuple[str, ...]] = ("causal", "segments", "left padding", "grouped heads")
    implementations: ClassVar[tuple[Implementation, ...]] = ()  # of the kernel it runs on
    source: ClassVar[str] = (
        ""  # the stream queries and keys come from: "" x itself, or a name of models/streams.py
    )

    def __call__(
        self, x: Array, *, positions: Array, segments: Array | None = None, starts: Array | None = None
    ) -> Array:
        """x [B, T, C] -> [B, T, C]; positions [B or 1, T], segments [B, T] (0: padding), starts [B], all int32."""
        raise NotImplementedError

    def init_cache(self, batch: int, length: int, starts: Array | None = None) -> Any:
        """An empty cache for `length` positions; starts [B] counts left-padding positions."""
        raise NotImplementedError

    def prefill(self, x: Array, cache: Any) -> tuple[Array, Any]:
        """Append x [B, T, C] to the cache; returns y [B, T, C] and the new cache."""
        raise NotImplementedError

    def step(self, x: Array, cache: Any) -> tuple[Array, Any]:
        """`prefill` for one token, x [B, 1, C]; mixers with a cheaper single step override it."""
        if x.shape[1] != 1:
            raise ValueError(f"step takes one token, got {x.shape[1]}; use prefill")
        return self.prefill(x, cache)

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        """Matrix-product FLOPs (a multiply-add counts two) a token, when a query sees `visible` keys on average."""
        raise NotImplementedError

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        """Numbers the decode cache of one sequence holds for `length` positions, besides its counters."""
        raise NotImplementedError

    def dense(self, features: int, name: str, use_bias: bool = False) -> nn.Dense:
        """A projection with this mixer's init and dtypes."""
        return nn.Dense(
            features,
            use_bias=use_bias,
            name=name,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(self.init_std),
        )


MIXERS: dict[str, type[Mixer]] = {}


def register(name: str):
    """Class decorator: make a mixer available to layer patterns as `name`."""

    def add(cls: type[Mixer]) -> type[Mixer]:
        MIXERS[name] = cls
        return cls

    return add


def find_mixer(name: str) -> type[Mixer]:
    """The mixer registered as `name`; ValueError with the nearest name otherwise."""
    if name in MIXERS:
        return MIXERS[name]
    near = difflib.get_close_matches(name, MIXERS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(MIXERS))}"
    raise ValueError(f"unknown mixer {name!r}; {hint}")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer of a pattern: a mixer's name and the options written in its brackets."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()


def parse_pattern(pattern: str) -> tuple[LayerSpec, ...]:
    """Read a layer pattern such as "forgetting*3 + softmax(window=64)" into one LayerSpec a layer.

    `+` joins, `*N` repeats, brackets group, and a name may carry options in its brackets. ValueError otherwise.
    """
    try:
        return tuple(_layers(ast.parse(pattern, mode="eval").body))
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"layer pattern {pattern!r} is not understood: {error}; write one like 'forgetting*3 + softmax'"
        ) from error


def _layers(node: ast.expr) -> list[LayerSpec]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _layers(node.left) + _layers(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        count = ast.literal_eval(node.right)
        if type(count) is not int or count < 1:
            raise ValueError(f"cannot repeat {count!r} times")
        return _layers(node.left) * count
    if isinstance(node, ast.Name):
        return [LayerSpec(_known(node.id))]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        options = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
        return [LayerSpec(_known(node.func.id), tuple(sorted(options.items())))]
    raise ValueError(f"{ast.unparse(node)!r} is neither a mixer nor + nor *")


def _known(name: str) -> str:
    find_mixer(name)
    return name


def shortest_period(layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """The shortest block which repeated gives `layers`, so that equal layers are compiled once."""
    for size in range(1, len(layers) + 1):
        if len(layers) % size == 0 and layers[:size] * (len(layers) // size) == layers:
            return layers[:size]
    return layers
