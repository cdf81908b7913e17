"""Linear attention: sums over keys in place of a softmax, with rotations and decays that weigh keys by their distance.

cosFormer: Rethinking Softmax in Attention, arXiv 2202.08791, section "cos-based re-weighting"; with angle = 0 it is the
linear attention of arXiv 2006.16236. Decays are those of gated linear attention, arXiv 2312.06635: one a token, one a
key channel (rows of the state), or one a value channel (columns of it, as Gated Slot Attention, arXiv 2409.07146, reads
its slots: u = S^T q with slots for value channels, then V^T p with slots for key channels).

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size of q and k, Dv head size
of v; t a query at position p_t = q_offset + t, s and l keys at positions s and l.
"""

import dataclasses

import jax

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.linear.arguments import Arguments, State, canonicalize
from kernels.linear.blockwise import blockwise, why_unsupported
from kernels.linear.gpu import gpu
from kernels.linear.gpu import why_unsupported as gpu_why_unsupported
from kernels.linear.reference import reference
from kernels.linear.sharded import EXCHANGES
from kernels.linear.tpu import tpu
from kernels.linear.tpu import why_unsupported as tpu_why_unsupported
from kernels.masks import Mask
from kernels.signatures import Array, Bool, Float, checked

__all__ = ["IMPLEMENTATIONS", "Mask", "State", "linear_attention"]

# In order of preference; the reference is last because its memory is quadratic in T.
IMPLEMENTATIONS = (
    Implementation("pallas_tpu", tpu, tpu_why_unsupported, platforms=("tpu",)),
    Implementation("pallas_gpu", gpu, gpu_why_unsupported, platforms=("cuda",)),
    Implementation("blockwise", blockwise, why_unsupported),
    Implementation("reference", reference),
)


@checked
def linear_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    angle: float | jax.Array = 0.0,
    log_key_decay: Float[Array, "B S K"] | Float[Array, "B S K D"] | None = None,
    log_value_decay: Float[Array, "B S K Dv"] | None = None,
    allowed: Bool[Array, "B T S"] | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    denominator: bool = True,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None] | tuple[jax.Array, jax.Array | None, State]:
    """Numerator and denominator of attention whose weights are products, turned by the distance of query and key.

        w_ts = sum_d q_td k_sd cos(angle_d (p_t - s)) [s visible to t]
        num_t = sum_s w_ts v_s        den_t = sum_s w_ts                            (2202.08791, cos-based re-weighting)

    With decays the state Z [D, Dv] of the keys so far is a gated sum, and a decay at t applies to the keys before t:

        Z_t = diag(e^{log_key_decay_t}) Z_{t-1} diag(e^{log_value_decay_t}) + k_t v_t^T,    num_t = Z_t^T q_t

    so that w_ts gains the factor exp(sum of log_key_decay over s < l <= t) inside its sum over d, and v_s the same of
    log_value_decay. Features (ReLU and the like) and the division are the caller's. Query head h reads key/value head
    h // G. A row that sees nothing has num = den = 0. Sums and states are float32 (float64 for float64 operands).

    Args:
        q, k, v: any one float dtype; K divides H. q and k are features already.
        mask: visibility, see `kernels.masks.Mask`; no window. Equal segment numbers must stand together in a row. Give
            the same array as q_segments and kv_segments where they are the same: it takes the faster way.
        angle: radians a position: a number shared by all channels; [D], one a channel; or [B, 1] or [B, D], others for
            each row. Gradients flow into angles of D channels; a shared one counts as a constant.
        log_key_decay: float32, finite and <= 0 (not checked): [B, S, K], one number a token and key/value head, or
            [B, S, K, D], one a key channel. It goes with any angle. The denominator decays with it. At keys that no
            query sees (padding, starts, lengths) nothing decays; a query reads the state as of the last key that is
            not after it, so past the last key nothing decays either. For a decay of its own in every query head,
            repeat k and v to H heads. Causal masks only.
        log_value_decay: float32, finite and <= 0: [B, S, K, Dv], one a value channel; needs denominator=False. The two
            may be combined.
        allowed: a dense mask on top of `mask`; only the reference takes it.
        initial_state: the keys before position 0, from a call before (or from another sequence) with the same angle.
            In a packed row it belongs to the document `segment` (the row's first one, if None).
        return_state: also return the state: all keys of this call and of `initial_state`, seen from position S; in a
            packed row those of its last document. It ignores `allowed` and the queries.
        denominator: False: den is None and states have Dv columns in place of Dv + 1, which saves its work.
        chunk_size: positions a step of the scan, chosen from the length by default; with decays a power of two.
        implementation: "pallas_tpu", "pallas_gpu" and "blockwise" (time and memory linear in T and S), "reference"
            (dense), or None for the best. The first two multiply bfloat16 operands in bfloat16, "pallas_tpu" also what
            it reads from a state; sums and states are float32.

    Returns:
        num [B, T, H, Dv], den [B, T, H] (None with denominator=False), and with return_state a `State`.

    Raises:
        ValueError: shapes or dtypes that do not fit, a window, a decay without a causal mask, a denominator with
            log_value_decay, a state that does not fit angle or segments, or an implementation that does not exist or
            cannot run here.

    Under `jax.set_mesh`, batch is split over ("data", "fsdp"), heads over "tensor" and time over "sequence", along
    which the state is carried; rows alone are split where queries do not stand beside their keys. See
    `kernels.dispatch.over_mesh`.
    """
    arguments = canonicalize(
        q, k, v, mask=mask, angle=angle, log_key_decay=log_key_decay, log_value_decay=log_value_decay,
        allowed=allowed, initial_state=initial_state, denominator=denominator, chunk_size=chunk_size,
    )  # fmt: skip
    num, den, state = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local),
        arguments, _layout(arguments), ("bth.", "bth" if denominator else None, _state_layout(arguments.state)),
        EXCHANGES,
    )  # fmt: skip
    if not return_state:
        return num, den
    return num, den, _one_of_each_head(state, k.shape[2])


def _one_of_each_head(state: State, heads: int) -> State:
    """Devices that share a key/value head have each made its state: keep one."""
    parts = {name: getattr(state, name) for name in ("real", "imag")}
    parts = {name: None if x is None else x[:, :: x.shape[1] // heads] for name, x in parts.items()}
    return dataclasses.replace(state, **parts)


def _layout(arguments: Arguments) -> Arguments:
    """The axis letters of every operand, for `dispatch.over_mesh`."""
    angle = arguments.angle
    letters = {"q": "bth.", "k": "bsk.", "v": "bsk.", "allowed": "bt.", "seen_rows": "bt"}
    letters |= {"key_decay": "bsk.", "value_decay": "bsk."}
    letters["angle"] = "b." if angle is not None and angle.shape[0] > 1 else ".."
    mask, state = dispatch.mask_layout(arguments.mask), _state_layout(arguments.state)
    return dataclasses.replace(dispatch.with_letters(arguments, **letters), mask=mask, state=state)


def _state_layout(state: State) -> State:
    return dispatch.with_letters(state, real="bk..", imag="bk..", segment="b")
