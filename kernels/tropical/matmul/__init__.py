"""The matrix product of the max-plus semiring.

Letters: M rows, N columns, K the axis maximised over; leading axes broadcast.
"""

import jax

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.signatures import Array, Float, checked
from kernels.tropical.matmul.arguments import canonicalize, layout
from kernels.tropical.matmul.blockwise import blockwise
from kernels.tropical.matmul.gpu import pallas_gpu
from kernels.tropical.matmul.gpu import why_unsupported as why_not_gpu
from kernels.tropical.matmul.reference import reference
from kernels.tropical.matmul.tpu import pallas_tpu
from kernels.tropical.matmul.tpu import why_unsupported as why_not_tpu

# In order of preference; the reference is last because it may hold M x K x N.
IMPLEMENTATIONS = (
    Implementation("pallas_tpu", pallas_tpu, why_not_tpu, ("tpu",)),
    Implementation("pallas_gpu", pallas_gpu, why_not_gpu, ("cuda",)),
    Implementation("blockwise", blockwise),
    Implementation("reference", reference),
)


@checked
def maxplus_matmul(
    a: Float[Array, "*A M K"],
    b: Float[Array, "*B K N"],
    *,
    return_winners: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*C M N"] | tuple[jax.Array, jax.Array]:
    """Max-plus product c_mn = max_k (a_mk + b_kn) (Tropical Attention, arXiv 2505.17190, section 2).

    The lowest k wins ties, and the gradient goes to the winner alone; entries may be -inf, the zero of the semiring.

    Args:
        a: [..., M, K], any float dtype.
        b: [..., K, N]; the leading axes of both broadcast.
        return_winners: also return the winning k.
        implementation: "pallas_tpu", "pallas_gpu" (float32 kernels), "blockwise" (nothing larger than operands and
            result), "reference" (dense), or None.

    Returns:
        c [..., M, N] in the operands' dtype, formed in float32 (float64 for float64 operands); with return_winners
        also int32 [..., M, N], -1 where c = -inf.

    Raises:
        ValueError: shapes that do not fit, empty operands, or an implementation that does not exist.

    Under `jax.set_mesh` the first leading axis is divided over ("data", "fsdp") and the second over "tensor".
    """
    arguments = canonicalize(a, b, return_winners)
    letters, out = layout(arguments)
    outs = out, out if return_winners else None
    c, winners = dispatch.over_mesh(
        lambda local: dispatch.run(IMPLEMENTATIONS, implementation, local), arguments, letters, outs
    )
    c = c.astype(jax.numpy.promote_types(a.dtype, b.dtype))
    return (c, winners) if return_winners else c
