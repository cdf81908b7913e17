"""The diagonal scan of the max-plus semiring: a maximum that decays along the sequence.

Letters: B batch, T length; a log-decay, b input, h state, all by channel.
"""

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.masks import Mask
from kernels.sequence import last_step
from kernels.signatures import Array, Float, checked
from kernels.tropical.scan.arguments import Arguments, canonicalize
from kernels.tropical.scan.blockwise import associative, blockwise
from kernels.tropical.scan.gpu import pallas_gpu
from kernels.tropical.scan.gpu import why_unsupported as why_not_gpu
from kernels.tropical.scan.reference import reference
from kernels.tropical.scan.sharded import EXCHANGES
from kernels.tropical.scan.tpu import pallas_tpu
from kernels.tropical.scan.tpu import why_unsupported as why_not_tpu

# In order of preference; the reference is last because it takes T steps and keeps its intermediate states.
IMPLEMENTATIONS = (
    Implementation("pallas_tpu", pallas_tpu, why_not_tpu, ("tpu",)),
    Implementation("pallas_gpu", pallas_gpu, why_not_gpu, ("cuda",)),
    Implementation("blockwise", blockwise),
    Implementation("associative", associative),
    Implementation("reference", reference),
)


@checked
def maxplus_scan(
    a: Float[Array, "B T *R"],
    b: Float[Array, "B T *R"],
    h0: Float[Array, " B *R"] | None = None,
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    return_state: bool = False,
    return_carry_wins: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T *R"] | tuple[jax.Array, ...]:
    """Running maximum with decay, channel by channel (an extension of arXiv 2505.17190 to sequences).

        h_t = max(a_t + h_{t-1}, b_t)

    The carried state wins ties, and the gradient goes to the winner alone. A packed document starts without a past
    (the first one from h0), left padding hands the state through; at padding h = -inf.

    Args:
        a: [B, T, ...] log-decay, any float dtype; any finite number or -inf, usually <= 0.
        b: [B, T, ...], finite or -inf.
        h0: [B, ...], the state before the first token; None: -inf.
        mask: segments and left padding; must be causal, without window, offset and lengths.
        return_state: also return the state after the last token.
        return_carry_wins: also return whether a_t + h_{t-1} >= b_t.
        implementation: "pallas_tpu", "pallas_gpu" (float32 kernels), "blockwise" (chunks), "associative" (one scan),
            "reference" (token by token), or None.

    Returns:
        h [B, T, ...] float32 (float64 for float64 operands); then, if asked for, the state [B, ...] in the same dtype
        and bool [B, T, ...].

    Raises:
        ValueError: shapes that do not fit, a mask it cannot honour, or an implementation that does not exist.

    Under `jax.set_mesh`, batch is split over ("data", "fsdp"), the axis after T over "tensor" and time over "sequence",
    along which the state is carried; see `kernels.dispatch.over_mesh`.
    """
    arguments, real = canonicalize(a, b, h0, mask)
    rest = ("h" + "." * a.ndim)[: a.ndim - 2]
    letters = Arguments("bt" + rest, "bt" + rest, "b" + rest)
    h, carry_wins = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local),
        arguments,
        letters,
        (letters.a, letters.a),
        EXCHANGES,
    )
    state = last_step(h)
    h = jnp.where(real.reshape(real.shape + (1,) * (a.ndim - 2)), h, -jnp.inf)
    more = (state,) * return_state + (carry_wins,) * return_carry_wins
    return (h, *more) if more else h
