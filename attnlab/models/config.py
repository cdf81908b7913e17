"""Everything that fixes a language model's shape and arithmetic, checked before anything is compiled."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.attention.mixer import MIXERS, LayerSpec, MixerConfig, find_mixer, parse_pattern, shortest_period
from attnlab.models.mlp import swiglu_size
from attnlab.models.streams import AUXILIARY, StreamConfig

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
REMAT = ("none", "block", "parts", "dots")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder language model; sizes in the letters of the papers, 0 where "derive it" is meant."""

    layers: str = (
        "forgetting"  # pattern of mixers, repeated to num_layers: "forgetting*3 + softmax(window=64)"
    )
    num_layers: int = 4  # L
    hidden_size: int = 256  # C
    num_heads: int = 4  # H
    num_kv_heads: int = 0  # K; 0: H
    head_dim: int = 0  # D; 0: C / H
    mlp_size: int = 0  # I; 0: from mlp_ratio
    mlp_ratio: float = 4.0  # I = 256 * ceil(int(C * ratio * 2/3) / 256)
    vocab_size: int = 0  # V; 0: the tokeniser's, rounded up to vocab_multiple
    vocab_multiple: int = 64
    tie_embeddings: bool = False
    logit_soft_cap: float = 0.0  # logits <- cap * tanh(logits / cap); 0: off
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: str = "float32"  # of activations; parameters, norms, gates, softmax and logits stay float32
    remat: str = (
        "none"  # recompute backward: "block", "parts" (mixer and MLP apart), "dots" (all but products)
    )
    scan_layers: bool = True  # one compiled period of the pattern, scanned; False: layers laid out one by one
    streams: StreamConfig = StreamConfig()  # what layers read beside their input, where a mixer does
    mixers: dict[str, MixerConfig] = dataclasses.field(
        default_factory=lambda: {name: mixer.Config() for name, mixer in sorted(MIXERS.items())}
    )  # options of each mixer, for all its layers; a pattern's brackets win over them

    def layer_configs(self) -> tuple[tuple[str, MixerConfig], ...]:
        """(mixer name, resolved config) of every layer in one period of the pattern."""
        return tuple((spec.name, self._resolve(spec)) for spec in shortest_period(self._all_layers()))

    @property
    def num_periods(self) -> int:
        return self.num_layers // len(self.layer_configs())

    def sources(self) -> tuple[str, ...]:
        """What its layers read beside their input: names of `streams.py`, in a fixed order."""
        found = {find_mixer(name).source for name, _ in self.layer_configs()}
        return tuple(source for source in ("embedding", *AUXILIARY) if source in found)

    def auxiliary(self) -> tuple[str, ...]:
        """The auxiliary streams its layers need."""
        return tuple(source for source in self.sources() if source in AUXILIARY)

    def pattern(self) -> tuple[LayerSpec, ...]:
        """The layers as written, before they are repeated to num_layers."""
        return parse_pattern(self.layers)

    def _all_layers(self) -> tuple[LayerSpec, ...]:
        pattern = self.pattern()
        if self.num_layers < 1 or self.num_layers % len(pattern):
            raise ValueError(
                f"num_layers={self.num_layers} is not a multiple of the {len(pattern)} layers of {self.layers!r}; "
                "change one of them"
            )
        return pattern * (self.num_layers // len(pattern))

    def _resolve(self, spec) -> MixerConfig:
        options = self.mixers.get(spec.name) or find_mixer(spec.name).Config()
        known = {field.name: field.type for field in dataclasses.fields(options)}
        for name, value in spec.options:
            if name not in known:
                raise ValueError(f"mixer {spec.name!r} has no option {name!r}; it has {', '.join(known)}")
            if type(value) is not known[name] and not (known[name] is float and type(value) is int):
                raise ValueError(
                    f"{spec.name}({name}={value!r}) has the wrong type; {name} is a {known[name].__name__}"
                )
        options = dataclasses.replace(options, **dict(spec.options))
        return options.resolve(self.num_heads, self.num_kv_heads, self.head_dim, self.hidden_size)

    @property
    def inner_size(self) -> int:
        return self.mlp_size or swiglu_size(self.hidden_size, self.mlp_ratio)

    def with_vocab(self, tokenizer_size: int) -> "ModelConfig":
        """Fill vocab_size from a tokeniser, or check the given one against it."""
        rounded = self.vocab_multiple * -(-tokenizer_size // self.vocab_multiple)
        if self.vocab_size and self.vocab_size < tokenizer_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} is below the tokeniser's {tokenizer_size}; raise it or set it to 0"
            )
        return dataclasses.replace(self, vocab_size=self.vocab_size or rounded)

    def validate(self) -> None:
        """Raise ValueError with the offending values when the sizes or options do not go together."""
        for name in ("hidden_size", "num_heads", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if self.dtype == "float64" and not jax.config.jax_enable_x64:
            raise ValueError(
                "model.dtype='float64' needs JAX's 64-bit mode; set JAX_ENABLE_X64=1, or use float32"
            )
        if self.remat not in REMAT:
            raise ValueError(f"model.remat={self.remat!r} is unknown; choose one of {', '.join(REMAT)}")
        if self.logit_soft_cap < 0:
            raise ValueError(f"model.logit_soft_cap={self.logit_soft_cap} is negative; use 0 for none")
        self.streams.validate()
        largest = max(self.streams.fixed_tokens, default=0)
        if self.vocab_size and largest >= self.vocab_size:
            raise ValueError(
                f"model.streams.fixed_tokens holds token {largest}, but the vocabulary has {self.vocab_size}"
            )
        self.layer_configs()
