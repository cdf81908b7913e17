"""Max-plus linear attention: causal tropical attention whose score factorises, with a state of constant size.

Letters: B batch, T length, H query heads, K key/value heads, G = H / K, D head size of q and k, Dv of v; M the state,
a log-decay, c context; i and j tokens, d' a channel of q and k.
"""

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.masks import Mask
from kernels.signatures import Array, Float, checked
from kernels.tropical.linear.arguments import LAYOUT, OUT_LAYOUT, canonicalize
from kernels.tropical.linear.blockwise import blockwise
from kernels.tropical.linear.gpu import pallas_gpu
from kernels.tropical.linear.gpu import why_unsupported as why_not_gpu
from kernels.tropical.linear.reference import INITIAL, NOTHING, reference
from kernels.tropical.linear.sharded import EXCHANGES
from kernels.tropical.linear.tpu import pallas_tpu
from kernels.tropical.linear.tpu import why_unsupported as why_not_tpu

__all__ = ["INITIAL", "NOTHING", "maxplus_linear_attention"]

# In order of preference; the reference is last because its gradient keeps the state of every token.
IMPLEMENTATIONS = (
    Implementation("pallas_tpu", pallas_tpu, why_not_tpu, ("tpu",)),
    Implementation("pallas_gpu", pallas_gpu, why_not_gpu, ("cuda",)),
    Implementation("blockwise", blockwise),
    Implementation("reference", reference),
)


@checked
def maxplus_linear_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    log_decay: Float[Array, "B T K"] | None = None,
    *,
    initial_state: Float[Array, "B K D Dv"] | None = None,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    return_state: bool = False,
    return_winners: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"] | tuple[jax.Array, ...]:
    """Causal tropical attention with the max-plus dot score, in linear time (an extension of arXiv 2505.17190).

        M_t[d', d] = max(a_t + M_{t-1}[d', d], k_td' + v_td)          c_td = max_d' (q_td' + M_t[d', d])

    The same as c_i = max_j (max_d' (q_id' + k_jd') + sum of a_l over j < l <= i + v_jd) by distributivity. Of equal
    sums the oldest key wins, then the lowest d'; gradients go to winners alone. Query head h reads head h // G.

    Args:
        q: [B, T, H, D], any float dtype.
        k: [B, T, K, D]; K divides H.
        v: [B, T, K, Dv].
        log_decay: [B, T, K], finite, usually <= 0; None: no decay. The first token of a packed document and padding
            have none, and get no gradient.
        initial_state: [B, K, D, Dv] before the first token, entries may be -inf; None: -inf.
        mask: segments and left padding; must be causal, without window, offset and lengths. The first document of a
            row goes on from initial_state, left padding hands it through.
        return_state: also return the state after the last token.
        return_winners: also return which key won: -1 is the initial state, -2 nothing.
        implementation: "pallas_tpu", "pallas_gpu" (float32 kernels), "blockwise" (chunks, linear memory), "reference"
            (token by token), or None for the best.

    Returns:
        c [B, T, H, Dv] float32 (float64 for float64 operands), the context before devaluation, -inf at padding; then,
        if asked for, the state [B, K, D, Dv] in the same dtype, and the winners int32 [B, T, H, Dv].

    Raises:
        ValueError: shapes that do not fit, a mask it cannot honour, or an implementation that does not exist.

    Under `jax.set_mesh`, batch is split over ("data", "fsdp"), heads over "tensor" and, unless winners are asked for,
    time over "sequence", along which the state is carried (of equal entries of the carried state the lowest d' then
    gets the gradient); see `kernels.dispatch.over_mesh`.
    """
    arguments, real = canonicalize(q, k, v, log_decay, initial_state, mask)
    c, winners, state = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local),
        arguments, LAYOUT, OUT_LAYOUT, () if return_winners else EXCHANGES,
    )  # fmt: skip
    state = _one_copy(state, k.shape[2])
    c = jnp.where(real[..., None, None], c, -jnp.inf)
    winners = jnp.where(c == -jnp.inf, NOTHING, winners)
    more = (state,) * return_state + (winners,) * return_winners
    return (c, *more) if more else c


def _one_copy(state, heads):
    """The state of each key/value head once: on a mesh with more devices than heads every device has computed one."""
    copies = state.shape[1] // heads
    if copies == 1:
        return state
    spec = jax.typeof(state).sharding.spec
    if any(
        axis is not None for axis in spec
    ):  # a mesh that tracks shardings refuses to slice along a divided axis
        state = jax.reshard(state, jax.sharding.PartitionSpec(spec[0]))
    return state[:, ::copies]
