"""Numbers that describe an attention map, and the logits before it (arXiv 2510.11602, section 4.4).

Letters: H heads, L length, A [..., H, L, L] a causal map, rows i are queries, columns j keys, both from 0.

    entropy    -sum_ij A_ij log A_ij                        conc       ||A||_F
    sink       (1/L) sum_i A_i0                             locfoc_n   (1/(L-n)) sum_{i>=n} A_{i,i-n}
    headdiv    2/(L(L+1)) sum_{j<=i} std over heads of A_ij

The paper scales these to [0, 1] over a set it does not name; `entropy_norm` and `conc_norm` have fixed bounds instead:
0 and 1 are the one-hot and the uniform causal map for entropy, the uniform and the one-hot map for concentration.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.signatures import Array, Bool, Float, checked

Map = Float[Array, "... H L L"]
PerHead = Float[Array, "... H"]


def _wide(A: jax.Array) -> jax.Array:
    return A.astype(jnp.promote_types(jnp.float32, A.dtype))


@checked
def entropy(A: Map) -> PerHead:
    """Sum of the entropies of all rows in nats, with 0 log 0 = 0; at least float32."""
    A = _wide(A)
    return -jnp.sum(jnp.where(A > 0, A * jnp.log(jnp.where(A > 0, A, 1)), 0), axis=(-2, -1))


@checked
def entropy_norm(A: Map) -> PerHead:
    """Entropy over that of the uniform causal map, sum_{i=1..L} log i. ValueError for L = 1, where both are 0."""
    L = _long_enough("entropy_norm", A)
    return entropy(A) / math.lgamma(L + 1)


@checked
def concentration(A: Map) -> PerHead:
    """Frobenius norm of each head's map."""
    return jnp.sqrt(jnp.sum(jnp.square(_wide(A)), axis=(-2, -1)))


@checked
def concentration_norm(A: Map) -> PerHead:
    """(conc - c0) / (sqrt(L) - c0), c0 = sqrt(sum_{i=1..L} 1/i) of the uniform causal map. ValueError for L = 1."""
    L = _long_enough("concentration_norm", A)
    least = math.sqrt(np.sum(1 / np.arange(1, L + 1)))
    return (concentration(A) - least) / (math.sqrt(L) - least)


def _long_enough(name: str, A: jax.Array) -> int:
    if A.shape[-1] < 2:
        raise ValueError(f"{name} needs a map of at least 2 positions, got L={A.shape[-1]}")
    return A.shape[-1]


@checked
def head_diversity(A: Map, *, ddof: int = 0) -> Float[Array, "..."]:
    """Mean over the causal entries of their standard deviation over heads, which divides by H - ddof.

    ValueError unless ddof is smaller than the number of heads.
    """
    H, L = A.shape[-3], A.shape[-1]
    if not 0 <= ddof < H:
        raise ValueError(f"{ddof=} needs more than {H} heads; use a ddof from 0 to {H - 1}")
    deviation = jnp.std(_wide(A), axis=-3, ddof=ddof)
    return 2 / (L * (L + 1)) * jnp.sum(jnp.tril(deviation), axis=(-2, -1))


@checked
def sink(A: Map) -> PerHead:
    """Mean weight of the first token."""
    return jnp.mean(_wide(A)[..., 0], axis=-1)


@checked
def local_focus(A: Map, distance: int) -> PerHead:
    """Mean weight of the token `distance` before the query, over the rows that have one. ValueError if none has."""
    if not 0 <= distance < A.shape[-1]:
        raise ValueError(f"{distance=} is outside a map of L={A.shape[-1]}; use 0 to {A.shape[-1] - 1}")
    return jnp.mean(jnp.diagonal(_wide(A), offset=-distance, axis1=-2, axis2=-1), axis=-1)


@checked
def indicators(A: Map, *, ddof: int = 0) -> dict[str, Array]:
    """All of them by the paper's names: headdiv [...], the others [..., H]; locfoc up to distance 3 or L - 1."""
    focus = {f"locfoc{n}": local_focus(A, n) for n in range(min(4, A.shape[-1]))}
    scaled = {} if A.shape[-1] < 2 else {"entropy_norm": entropy_norm(A), "conc_norm": concentration_norm(A)}
    return {
        "entropy": entropy(A),
        "conc": concentration(A),
        "headdiv": head_diversity(A, ddof=ddof),
        "sink": sink(A),
        **focus,
        **scaled,
    }


def logit_statistics(logits: Array, visible: Bool[Array, "..."] | None = None) -> dict[str, Array]:
    """min, max and the quantiles abs50, abs99, abs100 of |.| of the logits before a softmax, scalars, at least float32.

    visible: bool, broadcastable to the logits, of those to count. All are NaN if there are none (or a logit is NaN).
    """
    logits = _wide(jnp.asarray(logits))
    counted = jnp.ones(logits.shape, bool) if visible is None else jnp.broadcast_to(visible, logits.shape)
    broken = jnp.any(counted & jnp.isnan(logits))
    logits = jnp.where(counted, logits, jnp.nan)  # which the functions below pass over
    size = jnp.nanquantile(jnp.abs(logits), jnp.array([0.5, 0.99, 1.0]), axis=None)
    found = {"min": jnp.nanmin(logits), "max": jnp.nanmax(logits)}
    found |= {"abs50": size[0], "abs99": size[1], "abs100": size[2]}
    return {name: jnp.where(broken, jnp.nan, x) for name, x in found.items()}


def attention_map(attend: Callable[[Array], Array], batch: int, length: int, value_heads: int) -> Array:
    """The weights A [B, H, T, S] of anything that averages values, read off by giving it unit vectors as values.

    attend: v [B, S, K, Dv] -> o [B, T, H, Dv], linear in v, for example
        lambda v: softmax_attention(q, k, v)              lambda v: prefix_softmax(s, v)  (the non-approximate kind)
        lambda v: synth_random(table, v)                  lambda v: taylor_attention(q, k, v)
    batch, length, value_heads: B, S and K. Exact up to the rounding of attend; memory S x S.
    """
    unit = jnp.broadcast_to(jnp.eye(length)[None, :, None], (batch, length, value_heads, length))
    return jnp.moveaxis(attend(unit), 1, 2)
