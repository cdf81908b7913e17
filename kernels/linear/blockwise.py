"""Linear attention in pure JAX, with time and memory linear in T and S.

Letters: B batch, L positions, H query heads, K key/value heads, D head size, E = Dv + 1 columns.

`lines.py` brings a call into the form of a scan; without decays it is the scan of `chunks.py`, else of `decayed.py`.
"""

import math

import jax
import jax.numpy as jnp

from kernels.linear import lines, states
from kernels.linear.arguments import Arguments, State
from kernels.linear.chunks import chunked
from kernels.linear.decayed import decayed
from kernels.linear.lines import Line

CHUNK = 128


def blockwise(arguments: Arguments) -> tuple[jax.Array, jax.Array | None, State]:
    """Numerator [B, T, H, Dv], denominator [B, T, H] and the state after the last key, in the accumulation dtype."""
    return lines.evaluate(arguments, scan)


def why_unsupported(arguments: Arguments) -> str | None:
    if arguments.allowed is not None:
        return "it takes no dense `allowed` matrix, which has T x S entries"
    return None


def even_chunk(length: int, chunk_size: int | None) -> int:
    """The chunk size: the one asked for, or the least that covers `length` in as few chunks of at most CHUNK."""
    if chunk_size:
        return min(chunk_size, length)
    return math.ceil(length / math.ceil(length / CHUNK))


def binary_chunk(length: int, chunk_size: int | None) -> int:
    """The power of two up to chunk_size (CHUNK) that covers `length` in the fewest chunks."""
    most = 1 << ((chunk_size or CHUNK).bit_length() - 1)
    return min(most, 1 << (length - 1).bit_length())


def scan(line: Line) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Sweeps a line; see `lines.Scan`."""
    (B, L, H, D), K, decays = line.q.shape, line.k.shape[2], (line.key_decay, line.value_decay)
    plain = line.key_decay is None and line.value_decay is None
    C = even_chunk(L, line.chunk_size) if plain else binary_chunk(L, line.chunk_size)
    extra = -L % C
    q, k, v, *decays = (None if x is None else _padded(x, extra) for x in (line.q, line.k, line.v, *decays))
    documents = line.documents
    documents = None if documents is None else jnp.pad(documents, ((0, 0), (0, extra)), mode="edge")
    q = q.reshape(B, L + extra, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k, v, *decays = (None if x is None else x.swapaxes(1, 2) for x in (k, v, *decays))
    if plain:
        n, state = chunked(C, line.denominator, q, k, v, line.angle, documents, line.state, line.current)
        state = turned_back(state, line.angle, extra)
    else:
        v = v.astype(line.state.dtype)
        v = states.with_ones(v) if line.denominator else v
        n, state = decayed(C, q, k, v, *decays, documents, line.state[0], line.current)
        state = state[None]
    n = n.transpose(0, 3, 1, 2, 4).reshape(B, L + extra, H, -1)[:, :L]
    return (n[..., :-1], n[..., -1], state) if line.denominator else (n, None, state)


def _padded(x, extra):
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0)))


def turned_back(state, angle, extra):
    """`state` [P, B, K, D, E] as it was `extra` positions before: the padding of a line moves the point of view on."""
    if angle is None:
        return state
    back = states.turn(State(state[0], state[1]), angle[:, None], -extra)
    return jnp.stack([back.real, back.imag])
