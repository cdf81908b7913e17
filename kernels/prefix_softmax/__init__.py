"""Prefix softmax: a softmax whose logits belong to the keys alone, so that it is a recurrence of constant size.

Deconstructing Attention, arXiv 2510.11602, equations 7, 8 and 18 (the non-approximate kind), and AFT-simple of An
Attention Free Transformer, arXiv 2105.14103, where every channel is a head. Letters: B batch, S positions, H logit
heads, K value heads, Dv value size; i a row, j a key.
"""

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.masks import Mask
from kernels.prefix_softmax.arguments import (
    Arguments,
    PrefixState,
    canonicalize,
    default_chunk_size,
    empty_state,
)
from kernels.prefix_softmax.blockwise import blockwise
from kernels.prefix_softmax.gpu import gpu
from kernels.prefix_softmax.gpu import why_unsupported as why_not_on_gpu
from kernels.prefix_softmax.reference import reference
from kernels.prefix_softmax.sharded import EXCHANGES
from kernels.prefix_softmax.tpu import tpu
from kernels.prefix_softmax.tpu import why_unsupported as why_not_on_tpu
from kernels.sequence import last_step
from kernels.signatures import Array, Float, checked

__all__ = ["IMPLEMENTATIONS", "PrefixState", "default_chunk_size", "empty_state", "prefix_softmax"]

# In order of preference; the reference is last because its memory is quadratic in S.
IMPLEMENTATIONS = (
    Implementation("pallas_tpu", tpu, why_not_on_tpu, platforms=("tpu",)),
    Implementation("pallas_gpu", gpu, why_not_on_gpu, platforms=("cuda",)),
    Implementation("blockwise", blockwise),
    Implementation("reference", reference),
)


@checked
def prefix_softmax(
    s: Float[Array, "B S H"],
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    initial_state: PrefixState | None = None,
    return_lse: bool = False,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Array | tuple:
    """Averages of the values so far, weighted by a softmax of logits that do not depend on the row.

        o_i = sum_{j <= i} e^{s_j} v_j / sum_{j <= i} e^{s_j},     lse_i = log sum_{j <= i} e^{s_j}

    Logit head h weighs value head h // (H // K). Logits may be as large as floats are, and -inf (a key without
    weight). A row that sees no key gives o = 0, lse = -inf, and gradients of zero. Logits, maxima and sums are float32
    (float64 for float64 operands). With a non-causal mask every row of a document reads all of its keys.

    Args:
        s: [B, S, H], logits, any float dtype.
        v: [B, S, K, Dv], any float dtype; K divides H.
        mask: causal or not, segments, starts and lengths of `kernels.masks.Mask`. Rows are keys: q_segments must be
            kv_segments and q_offset 0 (rows for which a traced mask turns out otherwise are NaN). A document is one run
            of equal numbers, which padding (segment 0) may interrupt. No window.
        initial_state: the keys before the first one; None for none.
        return_lse: also return lse.
        return_state: also return the state after the last position (of the last document).
        chunk_size: positions a step takes at once; None chooses. The Pallas kernels round it up to whole tiles, and
            "reference" takes all at once.
        implementation: "pallas_tpu", "pallas_gpu" (kernels for float32 sums), "blockwise" (memory linear in S, pure
            JAX), "reference" (dense), or None for the platform's best.

    Returns:
        o [B, S, H, Dv] in v's dtype, or a tuple of it and what was asked for, in this order: lse [B, S, H], and a
        `PrefixState` of m and z [B, H] and n [B, H, Dv], all in the accumulation dtype.

    Raises:
        ValueError: shapes that do not fit, a window or q_offset, a state without causality or with segments, segments
            that differ between rows and keys, a chunk_size below 1, or an unknown implementation.

    Under `jax.set_mesh`, batch is split over ("data", "fsdp"), heads over "tensor" and, if causal, time over
    "sequence", along which the state is carried; see `kernels.dispatch.over_mesh`.
    """
    arguments = canonicalize(
        s, v, mask=mask, initial_state=initial_state, return_state=return_state, chunk_size=chunk_size
    )
    o, m, z = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local),
        arguments, _layout(arguments), ("bsh.", "bsh", "bsh"), EXCHANGES,
    )  # fmt: skip
    m = jax.lax.stop_gradient(m)
    m_end, z_end, o_end = (last_step(x) for x in (m, z, o))
    state = PrefixState(m_end, z_end, z_end[..., None] * o_end)
    o, z = _of_rows(o, z, mask)
    results = [o.astype(v.dtype)]
    if return_lse:
        some = z > 0
        results.append(jnp.where(some, m + jnp.log(jnp.where(some, z, 1)), -jnp.inf))
    if return_state:
        results.append(state)
    return tuple(results) if len(results) > 1 else results[0]


def _of_rows(o: jax.Array, z: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Empties the rows of padding; a row that is not its key's (only seen when run) becomes NaN instead of wrong."""
    if not isinstance(mask.q_offset, int):
        o = jnp.where(mask.q_offset == 0, o, jnp.nan)
    if mask.q_segments is None:
        return o, z
    q, kv = jnp.asarray(mask.q_segments), jnp.asarray(mask.kv_segments)
    o = jnp.where((q != 0)[..., None, None], o, 0)
    return jnp.where((q == kv)[..., None, None], o, jnp.nan), jnp.where((q != 0)[..., None], z, 0)


def _layout(arguments: Arguments) -> Arguments:
    """The axis letters of every operand, for `dispatch.over_mesh`."""
    return dispatch.with_letters(arguments, s="bsh", v="bsk.", runs="bs", m="bh", z="bh", n="bh.")
