"""The one-hidden-layer network of inverse distance weighting (arXiv 2310.18805) and its baselines.

Keys are hidden weights in input space, values are class logits; with inverse distance weights and cross-entropy the
keys become prototypes, which can be edited by hand (`attnlab/models/prototypes.py`).

Letters: N batch, F inputs (flattened), P prototypes, C classes; r_nj = |x_n - key_j|, p `power`, w weight, Z its sum.

    logits_n = sum_j a_nj value_j,   a_nj = softmax_j(s_nj)                                 `idw_network`

    idw            s = -log(eps + r^p)    a = w / Z, w = 1 / (eps + r^p)
    dot            s = x.key / sqrt(P)    by the number of prototypes, as published
    dot-sqrtd      s = x.key / sqrt(F)
    cosine         s = cos(x, key) / temperature
    neg-dist       s = -r^p
    exp-neg-dist   s = exp(-r^p / 2)
    inv-dist       s = 1 / (eps + r^p)
    fc-relu        no softmax: logits = relu(x.key) values
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.attention.inverse_distance import (
    InverseDistance,
    raise_distance,
    squared_distances,
    squared_norms,
)
from kernels.masks import Mask
from kernels.signatures import Array, Bool, Float, checked
from kernels.streaming import DotProduct, product, streaming_attention

METHODS = ("idw", "dot", "dot-sqrtd", "cosine", "neg-dist", "exp-neg-dist", "inv-dist", "fc-relu")


@dataclass(frozen=True)
class DistanceScore:
    """The baselines' scores of a distance in F dimensions: "neg-dist", "exp-neg-dist" or "inv-dist"."""

    F: int
    method: str
    eps: float
    power: float

    def __call__(self, x, rows, cols, of_rows, of_cols, extras):
        raised = raise_distance(*squared_distances(x, *of_rows, *of_cols, self.F), self.power)
        if self.method == "neg-dist":
            return -raised
        return jnp.exp(-0.5 * raised) if self.method == "exp-neg-dist" else 1 / (self.eps + raised)


@checked
def idw_network(
    x: Float[Array, " N *shape"],
    keys: Float[Array, " P *shape"],
    values: Float[Array, "P C"],
    *,
    method: str = "idw",
    eps: float = 1e-3,
    power: float = 2.0,
    temperature: float = 1.0,
    active: Bool[Array, " P"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "N C"]:
    """Logits of the network: `inverse_distance_attention` with one head, T = N, S = P, Dv = C for method "idw".

    Args:
        x, keys: inputs of any equal shape, flattened; x, keys and values of one float dtype.
        method: one of METHODS; the table above.
        eps: > 0, added to r^power by "idw" and "inv-dist".
        power: > 0, on the distance, of all methods with a distance.
        temperature: > 0, of "cosine" only.
        active: slots that hold a prototype; the others are as if they were not there. All by default.
        implementation: "blockwise", "reference" or None, of the softmax.

    Returns: logits in x's dtype; zeros if no slot is active.

    Raises: ValueError for shapes that do not fit, an unknown method, or a number that is not positive.
    """
    if method not in METHODS:
        raise ValueError(f"{method=} is unknown; choose one of {', '.join(map(repr, METHODS))}")
    for name, number in {"eps": eps, "power": power, "temperature": temperature}.items():
        if not number > 0:
            raise ValueError(f"{name}={number} must be positive")
    x, keys = x.reshape(x.shape[0], -1), keys.reshape(keys.shape[0], -1)
    if method == "fc-relu":
        hidden = jax.nn.relu(product(x, keys))
        hidden = hidden if active is None else jnp.where(active, hidden, 0)
        return jnp.matmul(hidden, values.astype(hidden.dtype), precision="highest").astype(x.dtype)
    count = len(keys) if active is None else jnp.maximum(jnp.sum(active), 1)
    score, extras = _score(method, float(eps), float(power), x.shape[1])
    if method == "cosine":
        x, keys = _directions(x) / temperature, _directions(keys)
    elif method == "dot":  # the count may be traced, so it cannot be part of the score
        x = (x * jnp.sqrt(1 / count)).astype(x.dtype)
    mask = Mask(causal=False)
    if active is not None:
        segments = jnp.ones((1, len(x)), jnp.int32), active.astype(jnp.int32)[None]
        mask = Mask(causal=False, q_segments=segments[0], kv_segments=segments[1])
    x, keys, values = (each[None, :, None, :] for each in (x, keys, values))
    norms = () if isinstance(score, DotProduct) else ((squared_norms(x),), (squared_norms(keys),), extras)
    return streaming_attention(score, x, keys, values, *norms, mask=mask, implementation=implementation)[
        0, :, 0
    ]


def _score(method, eps, power, F):
    """The score of a method, and its extra operands [1]."""
    if method == "idw":
        return InverseDistance(F, "official", power), (jnp.full(1, eps),)
    if method == "dot-sqrtd":
        return DotProduct(F**-0.5), ()
    if method in ("dot", "cosine"):
        return DotProduct(1.0), ()
    return DistanceScore(F, method, eps, power), ()


def _directions(x):
    """x / |x| over the last axis, 0 (and gradient 0) for x = 0."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return jnp.where(square > 0, x * jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
