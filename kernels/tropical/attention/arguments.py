"""The canonical form of a call to tropical attention: checked once here, trusted below. Letters: see the package."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import dispatch, masks
from kernels.masks import Mask

SCORES = ("hilbert", "hilbert_asym", "maxplus_dot", "lse_dot")
TILE = 1 << 15  # scores of a block of queries and keys, over all heads of a group: they stay in a CPU's cache


def static(**options):
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of a block of query rows and a block of keys."""

    q: int
    k: int

    def __post_init__(self):
        if not (isinstance(self.q, int) and isinstance(self.k, int) and self.q > 0 and self.k > 0):
            raise ValueError(f"block sizes q={self.q!r}, k={self.k!r} must be positive integers")

    @classmethod
    def choose(cls, T: int, S: int) -> "BlockSizes":
        """About 128 x 128, in blocks that divide the padded lengths evenly and are multiples of 8."""
        return cls(_even(T, 128), _even(S, 128))


def _even(length, target):
    blocks = -(-length // target)
    size = -(-length // blocks)
    return size if length < 8 else size + -size % 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """What every implementation receives; arrays in the working dtype, float32 or float64.

    q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv], bias [B or 1, H or 1, T or 1, S or 1] or None, slopes [H] or None,
    beta [] or None (hard maxima); score is never "lse_dot", which is "maxplus_dot" with beta = 1; block_sizes None: the
    implementation's own.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    slopes: jax.Array | None
    beta: jax.Array | None
    mask: Mask
    score: str = static()
    score_scale: float = static()
    block_sizes: BlockSizes | None = static()

    @property
    def group(self) -> int:
        """G, query heads that read one key/value head."""
        return self.q.shape[2] // self.k.shape[2]


def canonicalize(q, k, v, *, score, mask, bias, slopes, score_scale, smooth_beta, block_sizes) -> Arguments:
    """Checks a call and brings it into the one form the implementations share; see the public docstring for errors."""
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    if H % K:
        raise ValueError(f"{H=} query heads must be a multiple of the {K=} key/value heads")
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(
            f"empty operands q {q.shape}, k {k.shape}, v {v.shape}: every dimension must be at least 1"
        )
    if score not in SCORES:
        raise ValueError(f"{score=} is unknown; choose one of {SCORES}")
    dtype = jnp.promote_types(jnp.float32, jnp.promote_types(q.dtype, jnp.promote_types(k.dtype, v.dtype)))
    if bias is not None:
        _check_bias(bias.shape, (B, H, T, S))
        bias = bias.astype(dtype)
    slopes = None if slopes is None else slopes.astype(dtype)
    score, beta = _smoothing(score, smooth_beta, dtype)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    mask = masks.validate(mask, B, T, S)
    return Arguments(q, k, v, bias, slopes, beta, mask, score, float(score_scale), block_sizes)


def _check_bias(shape, full):
    if any(size not in (1, whole) for size, whole in zip(shape, full, strict=True)):
        raise ValueError(f"bias has shape {shape}, which does not broadcast to [B, H, T, S] = {full}")


def _smoothing(score, smooth_beta, dtype):
    if isinstance(smooth_beta, (int, float)) and not smooth_beta > 0:
        raise ValueError(f"{smooth_beta=} must be positive; None means hard maxima")
    if score != "lse_dot":
        return score, None if smooth_beta is None else jnp.asarray(smooth_beta, dtype)
    if smooth_beta is not None:
        raise ValueError(
            f"score='lse_dot' is smooth with beta 1, got {smooth_beta=}; use score='maxplus_dot' with it"
        )
    return "maxplus_dot", jnp.ones((), dtype)


def layout(arguments: Arguments) -> Arguments:
    """The axis letters of every operand, for `dispatch.over_mesh`."""
    (B, T, H, _), bias = arguments.q.shape, arguments.bias
    letters = {"q": "bth.", "k": "bsk.", "v": "bsk.", "slopes": "h", "beta": ""}
    if bias is not None:
        sizes = zip("bht", bias.shape, (B, H, T), strict=False)
        letters["bias"] = "".join(name if size == whole else "." for name, size, whole in sizes) + "."
    return dataclasses.replace(
        dispatch.with_letters(arguments, **letters), mask=dispatch.mask_layout(arguments.mask)
    )
