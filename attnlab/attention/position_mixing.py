"""Mixing over positions by free or fixed weights, without a softmax: token MLPs, MixiT's noise, FNet's waves.

Letters: B batch, T queries, S keys, H heads, K value heads, D and Dv head sizes, C channels, N table length or period;
t a query and j a key, as positions in their own document.

    token_mlp          o_t = sum_{j<=t} W[h,t,j] v_j + b[h,t]                      MLP-Mixer, 2105.01601; with the
                       y_t = silu(W_u x_t) * o_t                                   gate: gMLP, 2105.08050
    mixit              o_t = sum_{j<=t} A_tj v_j,  A = tril(I + c (n - mean_{j<=t} n)),  n noise      2506.01115
    fnet               y_t = c_t Re sum_{j<=t} e^(-2 pi i t j / N) F(x_j),  F the DFT over channels   2105.03824

All are causal, which FNet and MLP-Mixer are not at their source. They serve as controls to arXiv 2510.11602. A packed
document reads the table from its own first row on, and left padding takes no row. Options of all functions that are
not explained there: see `table_mixing.py`. Sums are float32 (float64 for float64 operands).
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.controls import UngroupedConfig
from attnlab.attention.heads import merge_heads
from attnlab.attention.mixer import MixerConfig, register
from attnlab.attention.table_mixer import TableConfig, TableMixer, check_length_option
from attnlab.attention.table_mixing import (
    Waves,
    check_positions,
    mix,
    of_table,
    poison_rows,
    random_table,
    rows_of,
)
from kernels import masks
from kernels.masks import Mask
from kernels.signatures import Array, Float, Int, checked

LARGEST_PERIOD = 46340  # its square still fits int32
ROWS = ("t", "N")


@checked
def token_mlp(
    W: Float[Array, "H N N"],
    b: Float[Array, "H N"] | None,
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    q_positions: Int[Array, "_ T"] | None = None,
    kv_positions: Int[Array, "_ S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"]:
    """A linear layer over positions, its weights masked; b None for none. A row that sees no key is zero, without b.

    With W = A of `mixit_map` this is MixiT.
    """
    S = v.shape[1]
    T = S if q_positions is None else q_positions.shape[1]
    o = of_table(W, v.astype(jnp.promote_types(jnp.float32, v.dtype)), False, mask, q_positions, kv_positions,
                  implementation)  # fmt: skip
    if b is not None:
        some = masks.dense(masks.validate(mask, v.shape[0], T, S), T, S).any(-1)
        o = jnp.where(some[..., None, None], o + rows_of(b[..., None].astype(o.dtype), T, q_positions), o)
    return o.astype(v.dtype)


@checked
def mixit_map(
    noise: Float[Array, "H N N"],
    *,
    scale: float = 1.0,
    add_identity: bool = True,
    sink_head0: bool = False,
) -> Float[Array, "H N N"]:
    """The fixed map of MixiT, unnormalised and causal; rows and columns past a length play no part before it.

    sink_head0: head 0 is half the token itself and half the first token.
    """
    N = noise.shape[-1]
    n = jnp.tril(noise)
    A = scale * (n - n.sum(-1, keepdims=True) / jnp.arange(1, N + 1, dtype=n.dtype)[:, None])
    identity = jnp.eye(N, dtype=n.dtype)
    A = jnp.tril(A + identity if add_identity else A)
    return A.at[0].set(0.5 * identity + 0.5 * (jnp.arange(N) == 0)) if sink_head0 else A


def channel_waves(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Real part and minus the imaginary part of the orthonormal DFT over channels, two float64 [C, C]."""
    index = np.arange(channels)
    angle = 2 * np.pi * (np.outer(index, index) % channels) / channels
    return np.cos(angle) / math.sqrt(channels), np.sin(angle) / math.sqrt(channels)


def channel_transform(x: jax.Array) -> jax.Array:
    """DFT over the channels of x [B, S, C], real part and minus imaginary part as heads [B, S, 2, C] (x's dtype)."""
    both = jnp.asarray(np.stack(channel_waves(x.shape[-1])), x.dtype)
    return jnp.einsum("bsc,pcd->bspd", x, both, precision="highest")


@checked
def fourier_mixing(
    transformed: Float[Array, "B S 2 C"],
    *,
    period: int,
    row: str = "t",
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    q_positions: Int[Array, "_ T"] | None = None,
    kv_positions: Int[Array, "_ S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T C"]:
    """FNet's transform over positions of `channel_transform(h)`, real part, with period N.

    row: the factor c_t of a row, "t" for 1 / sqrt(t + 1) or "N" for 1 / sqrt(N). With a non-causal mask, period = S and
    row="N" this is Re(FFT2) with orthonormal scaling. Rows at positions past the period are NaN.
    """
    if row not in ("t", "N"):
        raise ValueError(f"{row=} is unknown; choose 't' or 'N'")
    if not 1 <= period <= LARGEST_PERIOD:
        raise ValueError(f"{period=} is outside 1..{LARGEST_PERIOD}, where t j fits 32 bits; choose another")
    S = transformed.shape[1]
    T = S if q_positions is None else q_positions.shape[1]
    check_positions(period, transformed.shape[0], T, S, q_positions, kv_positions)
    t = jnp.arange(T)[None] if q_positions is None else q_positions
    j = jnp.arange(S)[None] if kv_positions is None else kv_positions
    wide = jnp.promote_types(jnp.float32, transformed.dtype)
    values = transformed.reshape(*transformed.shape[:2], 2, -1)
    y = mix(Waves(t, j, period, wide), values, T, mask, False, implementation).sum(2)
    factor = jax.lax.rsqrt(
        jnp.maximum(t, 0).astype(wide) + 1 if row == "t" else jnp.full(t.shape, period, wide)
    )
    return poison_rows(y * factor[..., None], q_positions, period, mask).astype(transformed.dtype)


# --- options -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TokenMLPConfig(TableConfig):
    gate: bool = False


@dataclasses.dataclass(frozen=True)
class MixITConfig(TableConfig):
    mix_scale: float = 1.0  # c
    add_identity: bool = True
    noise_std: float = 0.0  # of n; 0: N^-1/2
    noise_width: float = 0.0  # w: heads draw their std between (N w)^-1/2 and N^-1/2; 0: all have noise_std
    sink_head0: bool = False  # head 0 is half the token itself and half the first token

    def validate(self) -> None:
        super().validate()
        if self.noise_std < 0 or (self.noise_width and self.noise_width < 1):
            raise ValueError(
                f"noise_std={self.noise_std} must not be negative and noise_width={self.noise_width} be 0 or at least 1"
            )
        if self.noise_std and self.noise_width:
            raise ValueError(
                f"noise_std={self.noise_std} and noise_width={self.noise_width} both set the noise; choose one"
            )


@dataclasses.dataclass(frozen=True)
class FNetConfig(UngroupedConfig):
    """No heads: their numbers and sizes are other layers' business."""

    max_length: int = 1024  # N: the period, and the longest input
    row: str = "t"  # c_t = 1 / sqrt(t + 1), or "N": 1 / sqrt(N)
    channels: int = 0  # C; 0: the model's hidden size, the only value it can have

    def resolve(self, num_heads: int, num_kv_heads: int, head_dim: int, hidden_size: int) -> "FNetConfig":
        if self.channels not in (0, hidden_size):
            raise ValueError(f"channels={self.channels} must be hidden_size={hidden_size}; leave it 0")
        config = dataclasses.replace(self, channels=hidden_size)
        return UngroupedConfig.resolve(config, num_heads, num_kv_heads, head_dim, hidden_size)

    def validate(self) -> None:
        check_length_option(self.max_length)
        if self.max_length > LARGEST_PERIOD:
            raise ValueError(f"max_length={self.max_length} exceeds {LARGEST_PERIOD}, where t j fits 32 bits")
        if self.row not in ROWS:
            raise ValueError(f"row={self.row!r} is unknown; choose 't' or 'N'")


# --- modules -----------------------------------------------------------------------------------------------


@register("token_mlp")
class TokenMLP(TableMixer):
    """A causal linear layer over positions; with `gate` the spatial gating unit of gMLP."""

    Config: ClassVar[type[MixerConfig]] = TokenMLPConfig
    paper: ClassVar[str] = "MLP-Mixer, arXiv 2105.01601; gMLP, arXiv 2105.08050"

    def setup_table(self):
        c = self.config
        self.weights = self.table(
            "mixing", 1e-3 if c.gate else c.max_length**-0.5, c.max_length, c.max_length
        )
        bias = nn.initializers.ones if c.gate else nn.initializers.zeros
        self.bias = self.param("mixing_bias", bias, (c.num_heads, c.max_length), self.param_dtype)
        if c.gate:
            self.gate = self.dense(c.num_heads * c.head_dim, "gate")

    def mix(self, x, v, **options):
        return token_mlp(self.weights, self.bias, v, **options)

    def readout(self, x, o):
        o = merge_heads(o)
        return self.out(jax.nn.silu(self.gate(x)) * o if self.config.gate else o)

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        gate = 2 * hidden_size * config.num_heads * config.head_dim if config.gate else 0
        return gate + TableMixer.forward_flops(config, hidden_size, visible)


@register("mixit")
class MixIT(TableMixer):
    """Values mixed by fixed noise, which is drawn once, saved with the weights and never trained."""

    Config: ClassVar[type[MixerConfig]] = MixITConfig
    paper: ClassVar[str] = "MixiT, arXiv 2506.01115"

    def setup_table(self):
        c = self.config
        shape = (c.num_heads, c.max_length, c.max_length)
        initialise = noise(c.noise_std, c.noise_width)
        self.noise = jax.lax.stop_gradient(self.param("frozen_noise", initialise, shape, self.param_dtype))

    def mix(self, x, v, **options):
        c = self.config
        A = mixit_map(self.noise, scale=c.mix_scale, add_identity=c.add_identity, sink_head0=c.sink_head0)
        return token_mlp(A, None, v, **options)


def noise(std: float, width: float):
    """Initialiser of MixiT's noise [H, N, N], see `MixITConfig`; a longer one begins with the shorter, rescaled."""

    def initialise(key, shape, dtype=jnp.float32):
        H, N, _ = shape
        scale = jnp.full((H, 1, 1), std or N**-0.5)
        if width:
            of_heads = jax.random.fold_in(key, 2**31 - 1)  # no row has this number
            scale = jax.random.uniform(of_heads, (H, 1, 1), minval=(N * width) ** -0.5, maxval=N**-0.5)
        return (scale * random_table(1.0)(key, shape, jnp.float32)).astype(dtype)

    return initialise


@register("fnet")
class FNet(TableMixer):
    """The causal Fourier transform over channels and positions: no parameters at all, and no output projection."""

    Config: ClassVar[type[MixerConfig]] = FNetConfig
    paper: ClassVar[str] = "FNet, arXiv 2105.03824"
    masks: ClassVar[tuple[str, ...]] = ("causal", "segments", "left padding")

    def setup(self):
        pass

    def values(self, x):
        return channel_transform(x)

    def value_shape(self):
        return 2, self.config.channels

    def mix(self, x, v, **options):
        return fourier_mixing(v, period=self.config.max_length, row=self.config.row, **options)

    def readout(self, x, o):
        return o

    @staticmethod
    def forward_flops(config: Any, hidden_size: int, visible: float) -> float:
        return 2 * 2 * hidden_size * (hidden_size + visible)

    @staticmethod
    def state_size(config: Any, length: int) -> int:
        return 2 * length * config.channels
