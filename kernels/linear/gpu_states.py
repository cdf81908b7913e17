"""Linear recurrences over the chunks of a line, by associative scan: the part of the GPU form that is linear in chunks.

Letters: B batch, N chunks, K heads, D, E dimensions of a state; states with an imaginary part are complex here.
"""

import jax
import jax.numpy as jnp


def chain(factors: jax.Array, added: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Z_{c+1} = factors_c Z_c + added_c from Z_0 = start: Z_0 .. Z_{N-1} [B, N, ...] and Z_N [B, ...]."""
    none = jnp.ones_like(factors[:, :1])
    factors = jnp.concatenate([none, factors], axis=1)
    added = jnp.concatenate([start[:, None], added], axis=1)

    def join(one, two):
        return one[0] * two[0], two[0] * one[1] + two[1]

    Z = jax.lax.associative_scan(join, (factors, added), axis=1)[1]
    return Z[:, :-1], Z[:, -1]


def joined(x: jax.Array) -> jax.Array:
    """[P, ...] parts -> real or complex [...]."""
    return x[0] if len(x) == 1 else jax.lax.complex(x[0], x[1])


def parts(x: jax.Array, P: int) -> jax.Array:
    """real or complex [...] -> [P, ...]."""
    return x.real[None] if P == 1 else jnp.stack([x.real, x.imag])


def log_factor_gradients(factors, before, after, g, h) -> dict[str, jax.Array]:
    """Gradients of the sums of log decays over a chunk by way of the states, [B, N, K, X] of each of g and h given.

    before, after: {Z, z}, states before each chunk and adjoints of those after it, [P, B, N, K, D, (E)].
    """
    if g is None and h is None:
        return {}
    d = (joined(after["Z"]) * jnp.conj(factors * joined(before["Z"]))).real  # [B, N, K, D, E]
    found = {}
    if g is not None:
        found["g"] = d.sum(-1)
        if "z" in before:
            found["g"] += (joined(after["z"]) * jnp.conj(factors[..., 0] * joined(before["z"]))).real
        found["g"] = found["g"] if g.shape[3] > 1 else found["g"].sum(-1, keepdims=True)
    if h is not None:
        found["h"] = d.sum(-2)
    return found
