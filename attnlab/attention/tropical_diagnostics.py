"""What to look at in tropical attention (arXiv 2505.17190): margins of winners, and a softening that factorises.

Letters: B batch, T queries, S keys, H heads, D and Dv head sizes; S_ij scores, v values, c context.
"""

import jax
import jax.numpy as jnp

from kernels.masks import Mask
from kernels.signatures import Array, Float, checked
from kernels.tropical import tropical_attention


@checked
def winner_margins(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(causal=False),  # noqa: B008 (frozen)
    score: str = "hilbert",
    score_scale: float = 1.0,
) -> Float[Array, "B T H Dv"]:
    """By how much the winning key of each channel leads the runner-up, float32 (float64 for float64 operands), >= 0.

    A certificate: moving every sum S_ij + v_jd by less than half the margin changes no winner. inf where a single key
    is visible, 0 where none is. One pass for every key of a row, so for inspection of few keys: time grows with S^2.
    """
    S = k.shape[1]
    options = {"mask": mask, "score": score, "score_scale": score_scale, "return_context": True}
    _, best, winners = tropical_attention(q, k, v, return_winners=True, **options)

    def without(carry, j):
        """The best context when key j is hidden, where j is the winner of a channel."""
        hidden = jnp.where(jnp.arange(S) == j, -jnp.inf, 0)[None, None, None].astype(best.dtype)
        _, other = tropical_attention(q, k, v, bias=hidden, **options)
        return jnp.where(winners == j, other, carry), None

    second, _ = jax.lax.scan(without, jnp.full_like(best, -jnp.inf), jnp.arange(S))
    return jnp.where(best == -jnp.inf, 0, best - second)


@checked
def smooth_context_factorised(
    scores: Float[Array, "B H T S"], v: Float[Array, "B S H Dv"], beta: float | jax.Array
) -> Float[Array, "B T H Dv"]:
    """The smooth aggregation (1 / beta) log sum_j exp(beta (S_ij + v_jd)) as one ordinary matrix product.

        c = m_i + n_d + (1 / beta) log sum_j exp(beta (S_ij - m_i)) exp(beta (v_jd - n_d)),  m_i = max S, n_d = max v

    Fast on matrix units, but for large beta the factors vanish where winners lie far below both maxima: then -inf.
    """
    v = v.swapaxes(1, 2)
    m, n = scores.max(-1, keepdims=True), v.max(2, keepdims=True)
    weights = jnp.exp(beta * (scores - m)) @ jnp.exp(beta * (v - n))
    return (m + n + jnp.log(weights) / beta).swapaxes(1, 2)
