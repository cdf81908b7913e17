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

from attnlab.attention.inverse_distance import InverseDistance, raise_distance, squared_distances
from kernels.masks import Mask
from kernels.signatures import Array, Bool, Float, checked
from kernels.streaming import DotProduct, product, streaming_attention

METHODS = ("idw", "dot", "dot-sqrtd", "cosine", "neg-dist", "exp-neg-dist", "inv-dist", "fc-relu")


@dataclass(frozen=True)
class DistanceScore:
    """The baselines' scores of a distance: "neg-dist", "exp-neg-dist" or "inv-dist"."""

    method: str
    eps: float
    power: float

    def __call__(self, q, k, rows, cols):
        raised = raise_distance(*squared_distances(q, k), self.power)
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
    score, scale = _score(method, float(eps), float(power), x.shape[1])
    if method == "cosine":
        x, keys = _directions(x) / temperature, _directions(keys)
    elif method == "dot":  # the count may be traced, so it cannot be part of the score
        x = (x * jnp.sqrt(1 / count)).astype(x.dtype)
    mask = Mask(causal=False)
    if active is not None:
        segments = jnp.ones((1, len(x)), jnp.int32), active.astype(jnp.int32)[None]
        mask = Mask(causal=False, q_segments=segments[0], kv_segments=segments[1])
    heads = (each[None, :, None, :] for each in (x, keys, values))
    extras = () if scale is None else (scale,)
    return streaming_attention(score, *heads, extras, mask=mask, implementation=implementation)[0, :, 0]


def _score(method, eps, power, F):
    """The block score of a method, and its extra operand [1] or None."""
    if method == "idw":
        return InverseDistance("official", power), jnp.full(1, eps)
    if method == "dot-sqrtd":
        return DotProduct(F**-0.5), None
    if method in ("dot", "cosine"):
        return DotProduct(1.0), None
    return DistanceScore(method, eps, power), None


def _directions(x):
    """x / |x| over the last axis, 0 (and gradient 0) for x = 0."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return jnp.where(square > 0, x * jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
