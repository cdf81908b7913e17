"""Slot attention: one softmax over M gated memory slots and a window of exact tokens (Native Hybrid Attention).

Native Hybrid Attention for Efficient Sequence Modeling, arXiv 2510.07019, on the slots of Gated Slot Attention, arXiv
2409.07146. Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size of q and k, Dv
that of v, M slots, W window, n slot shift; t a query row at position a = q_offset + t, e = a - n the key that enters
the slots with it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.masks import Mask
from kernels.signatures import Array, Float, checked
from kernels.slots.arguments import Arguments, ChunkSizes, SlotState, canonicalize
from kernels.slots.blockwise import blockwise
from kernels.slots.gated import gpu, tpu, why_not_on_gpu, why_not_on_tpu
from kernels.slots.reference import reference
from kernels.slots.sharded import EXCHANGES

__all__ = ["ChunkSizes", "Mask", "SlotState", "slot_attention"]

# In order of preference; the reference walks token by token and holds T x S logits.
IMPLEMENTATIONS = (
    Implementation("pallas_tpu", tpu, why_not_on_tpu, platforms=("tpu",)),
    Implementation("pallas_gpu", gpu, why_not_on_gpu, platforms=("cuda",)),
    Implementation("blockwise", blockwise),
    Implementation("reference", reference),
)


@checked
def slot_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    log_gates: Float[Array, "B S K M"],
    *,
    window: int,
    q_window: Float[Array, "B T H Dw"] | None = None,
    k_window: Float[Array, "B S K Dw"] | None = None,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    slot_shift: int | None = None,
    empty_slots: str = "sink",
    initial_state: SlotState | None = None,
    document_state: str = "zero",
    scale: float | None = None,
    return_state: bool = False,
    return_lse: bool = False,
    return_branch_lse: bool = False,
    implementation: str | None = None,
    chunk_sizes: ChunkSizes | None = None,
):
    """Attention whose keys are M slots, a gated summary of the far past, and the exact tokens of a window.

        K_t = diag(alpha_e) K_{t-1} + (1 - alpha_e) k_e^T,   V_t likewise with v_e,   alpha_e = exp(log_gates_e)
        u_t = scale K_t q_t [M],   w_tj = scale q'_t . k'_j for a - W < j <= a            (primes: q_window, k_window)
        o_t = V_t^T p_t + sum_j r_tj v_j,     (p_t, r_t) = softmax(u_t, w_t)

    With n = W each past token is in exactly one of the two memories. Query head h reads key/value head h // G. Logits,
    softmax, gates and states are float32 (float64 for float64 operands).

    Args:
        q: [B, T, H, D], any float dtype; reads the slots. No positions are added here.
        k: [B, S, K, D], same dtype; written to the slots. S > T: earlier keys, such as a decode cache, come first, and
            mask.q_offset = S - T.
        v: [B, S, K, Dv], same dtype.
        log_gates: [B, S, K, M] float32 (or float64), <= 0 and finite: log of the share each slot keeps when token
            e enters.
        window: W >= 0 tokens, the row's own included; 0 is pure (gated) slot attention.
        q_window, k_window: what the window compares instead of q and k, for instance rotated copies.
        mask: causal; segments (a state and a window for each document, numbers growing along the row; padding writes
            nothing), starts, lengths, q_offset. The query at position a is the token of key a.
        slot_shift: n, by default W: a token enters the slots n steps after it was read.
        empty_slots: "sink": slots nothing was written to are keys of logit 0 and value 0, as published; "mask": the
            slots are left out of the softmax until a token entered them (an initial state counts as written).
        initial_state: the slots before the first row (only keys e >= q_offset - n enter on top of it); 0 by default.
        document_state: what each further document of a row starts from: "zero", or the "initial" state.
        scale: factor of both kinds of logits, D ** -0.5 by default.
        return_state: also return the `SlotState` after the last row.
        return_lse: also return log sum exp of all logits, [B, T, H].
        return_branch_lse: also return (lse of the slots, lse of the window), [B, T, H] each; sigmoid of their
            difference is the attention mass on the slots.
        implementation: "pallas_tpu", "pallas_gpu" (the kernels of gated linear attention and of the window),
            "blockwise" (memory linear in T, pure JAX), "reference" (a loop over tokens), or None for the best.
        chunk_sizes: of the blockwise form; no effect on the result beyond rounding.

    Returns:
        o [B, T, H, Dv] in q's dtype, or a tuple of o and what was asked for, in the order of the arguments above. Rows
        that are padding are 0, with an lse of -inf and gradients of zero.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; a mask that is not causal or has a window of its own; an
            implementation that does not exist or cannot run here.

    Under `jax.set_mesh`, batch is split over ("data", "fsdp"), heads over "tensor" and time over "sequence", along
    which the slots are carried. The sequence stays whole where queries and keys are not one, or where documents of a
    packed row restart from the initial state; see `kernels.dispatch.over_mesh`.
    """
    arguments = canonicalize(
        q, k, v, log_gates, window=window, q_window=q_window, k_window=k_window, mask=mask, slot_shift=slot_shift,
        empty_slots=empty_slots, initial_state=initial_state, document_state=document_state, scale=scale,
        chunk_sizes=chunk_sizes,
    )  # fmt: skip
    o, lse_slots, lse_window, state = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local),
        arguments, _layout(arguments), ("bth.", "bth", "bth", SlotState("bk..", "bk..", "b")), EXCHANGES,
    )  # fmt: skip
    results = [o]
    if return_state:
        results.append(_one_per_head(state, k.shape[2]))
    if return_lse:
        results.append(_logaddexp(lse_slots, lse_window))
    if return_branch_lse:
        results.append((lse_slots, lse_window))
    return tuple(results) if len(results) > 1 else o


def _layout(arguments: Arguments) -> Arguments:
    """The axis letters of every operand, for `dispatch.over_mesh`."""
    return dataclasses.replace(
        arguments, q="bth.", k="bsk.", v="bsk.", q_window="bth.", k_window="bsk.", log_gates="bsk.",
        state=SlotState("bk..", "bk..", "b"), mask=dispatch.mask_layout(arguments.mask),
    )  # fmt: skip


def _one_per_head(state: SlotState, K: int) -> SlotState:
    """A mesh with more devices than key/value heads computes copies of a head's state; keep one of each."""
    copies = state.key.shape[1] // K
    return SlotState(state.key[:, ::copies], state.value[:, ::copies], state.written)


def _logaddexp(x: jax.Array, y: jax.Array) -> jax.Array:
    """log(exp x + exp y), with finite gradients where one or both are -inf."""
    highest = jax.lax.stop_gradient(jnp.maximum(x, y))
    highest = jnp.where(highest > -jnp.inf, highest, 0)
    total = jnp.exp(x - highest) + jnp.exp(y - highest)
    return jnp.where(total > 0, highest + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)
