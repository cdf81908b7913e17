"""Tropical operations in the fewest plain additions and comparisons, for the compiler to count.

The operations of the library choose winners by index, so that ties have a rule; the compiler counts that bookkeeping
as well. Here every maximum is `jnp.max`, which is what the cost formulas of the mixers promise to count.
"""

import jax
import jax.numpy as jnp

from attnlab.attention.mixer import find_mixer
from tests.attention.contract import B, build


def plain_map(u, w, implementation=None):
    return jnp.max(u[..., None, :] + (w if w.ndim == 2 else w[None, None]), axis=-1)


def plain_attention(q, k, v, *, score, mask, slopes, **options):
    """The additions and comparisons over T x S x D of each score, without mask and slopes."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    q, k = q[:, :, None], k[:, None]
    if score == "hilbert":
        difference = q - k
        s = difference.min(-1) - difference.max(-1)
    elif score == "hilbert_asym":
        s = (q - k).min(-1)
    else:
        s = (q + k).max(-1)
    return jnp.max(s[..., None] + v[:, None], axis=2)


def plain_linear_step(q, k, v, a, **options):
    """One step of max-plus linear attention for every token, each from the same state."""
    (B, T, H, D), K = q.shape, k.shape[2]
    state = jnp.ones((K, D, v.shape[3]), q.dtype)
    state = state if a is None else a[..., None, None] + state
    state = jnp.maximum(state, k[..., :, None] + v[..., None, :])
    c = jnp.max(q.reshape(B, T, K, H // K, D)[..., None] + state[:, :, :, None], axis=-2)
    return c.reshape(B, T, H, -1), state[:, -1]


def plain_scan_step(a, b, h0, **options):
    """One step of the scan for every token, each from the same state."""
    h = jnp.maximum(a + 1, b)
    return h, h[:, -1]


def counted_over_formula(name, length, options) -> float:
    """Operations of a token by the compiler, over the mixer's formula; the rest is elementwise and small."""
    module, params = build(
        name, channels=128, **(options | {"head_dim": 128} | ({"window": 0} if "window" in options else {}))
    )
    x = jnp.zeros((B, length, 128))
    call = jax.jit(lambda p, x: module.apply(p, x, positions=jnp.arange(length)[None]))
    counted = call.lower(params, x).cost_analysis()["flops"] / (B * length)
    return counted / find_mixer(name).forward_flops(module.config, 128, visible=length)
