"""Linear attention: sums over keys in place of a softmax, with a rotation that weighs keys by the cosine of distance.

cosFormer: Rethinking Softmax in Attention, arXiv 2202.08791, section "cos-based re-weighting"; with angle = 0 it is the
linear attention of arXiv 2006.16236. Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K,
D head size of q and k, Dv head size of v; t a query at position p_t = q_offset + t, s a key at position s.
"""

import dataclasses

import jax

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.linear.arguments import Arguments, State, canonicalize
from kernels.linear.blockwise import blockwise, why_unsupported
from kernels.linear.reference import reference
from kernels.masks import Mask
from kernels.signatures import Array, Bool, Float, checked

__all__ = ["IMPLEMENTATIONS", "Mask", "State", "linear_attention"]

# In order of preference; the reference is last because its memory is quadratic in T.
IMPLEMENTATIONS = (
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
    allowed: Bool[Array, "B T S"] | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array] | tuple[jax.Array, jax.Array, State]:
    """Numerator and denominator of attention whose weights are products, turned by the distance of query and key.

        w_ts = sum_d q_td k_sd cos(angle_d (p_t - s)) [s visible to t]
        num_t = sum_s w_ts v_s        den_t = sum_s w_ts                            (2202.08791, cos-based re-weighting)

    Features (ReLU and the like) and the division are the caller's. Query head h reads key/value head h // G. A row that
    sees nothing has num = den = 0. Sums and states are float32 (float64 for float64 operands).

    Args:
        q, k, v: any one float dtype; K divides H. q and k are features already.
        mask: visibility, see `kernels.masks.Mask`; no window. Equal segment numbers must stand together in a row. Give
            the same array as q_segments and kv_segments where they are the same: it takes the faster way.
        angle: radians a position: a number shared by all channels; [D], one a channel; or [B, 1] or [B, D], others for
            each row. Gradients flow into angles of D channels; a shared one counts as a constant.
        allowed: a dense mask on top of `mask`; only the reference takes it.
        initial_state: the keys before position 0, from a call before (or from another sequence) with the same angle.
            In a packed row it belongs to the document `segment` (the row's first one, if None).
        return_state: also return the state: all keys of this call and of `initial_state`, seen from position S; in a
            packed row those of its last document. It ignores `allowed` and the queries.
        chunk_size: positions a step of the scan, chosen from the length by default.
        implementation: "blockwise" (time and memory linear in T and S), "reference" (dense), or None for the best.

    Returns:
        num [B, T, H, Dv], den [B, T, H], and with return_state a `State`.

    Raises:
        ValueError: shapes or dtypes that do not fit, a window, a state that does not fit angle or segments, or an
            implementation that does not exist or cannot run here.

    Under `jax.set_mesh`, batch is split over ("data", "fsdp") and heads over "tensor"; the sequence stays whole; see
    `kernels.dispatch.over_mesh`.
    """
    arguments = canonicalize(
        q, k, v, mask=mask, angle=angle, allowed=allowed, initial_state=initial_state, chunk_size=chunk_size
    )
    num, den, state = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local),
        arguments, _layout(arguments), ("b.h.", "b.h", _state_layout(arguments.state)),
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
    letters = {"q": "b.h.", "k": "b.k.", "v": "b.k.", "allowed": "b..", "seen_rows": "b."}
    letters["angle"] = "b." if angle is not None and angle.shape[0] > 1 else ".."
    mask, state = dispatch.mask_layout(arguments.mask), _state_layout(arguments.state)
    return dataclasses.replace(dispatch.with_letters(arguments, **letters), mask=mask, state=state)


def _state_layout(state: State) -> State:
    return dispatch.with_letters(state, real="bk..", imag="bk..", segment="b")
