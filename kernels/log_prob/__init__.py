"""Log-probabilities, normalisers and entropies of tokens under a vocabulary head, without the logits [N, V] in memory.

The hot spot of language modelling and of policy gradients with large vocabularies (entropy as in EGSW, arXiv
2503.22456). Letters: B batch, T length, N rows, D hidden size, V vocabulary; n a row, v a token.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import dispatch, pallas
from kernels.dispatch import Implementation
from kernels.log_prob import blockwise, gpu, sharded, tpu
from kernels.log_prob.arguments import BlockSizes, canonicalize
from kernels.log_prob.reference import reference
from kernels.signatures import Array, Bool, Float, Int, checked

__all__ = ["IMPLEMENTATIONS", "BlockSizes", "TokenLogProbs", "token_log_probs"]


def _pallas(kernel):
    """Reads now whether to simulate: the backward pass may be traced elsewhere."""
    return lambda arguments: sharded.run(kernel(pallas.interpret()), arguments)


# In order of preference; the reference is last because it holds all logits.
IMPLEMENTATIONS = (
    Implementation("pallas_tpu", _pallas(tpu.kernel), tpu.why_unsupported, platforms=("tpu",)),
    Implementation("pallas_gpu", _pallas(gpu.kernel), gpu.why_unsupported, platforms=("cuda",)),
    Implementation("blockwise", partial(sharded.run, blockwise.KERNEL)),
    Implementation("reference", reference),
)


class TokenLogProbs(NamedTuple):
    """Of every row, in labels' shape, float32 (float64) nats: log p(label), the normaliser lse, the entropy H >= 0.

    argmax: the likeliest token, int32, the lowest of equals. entropy and argmax are None unless asked for.
    """

    logp: jax.Array
    lse: jax.Array
    entropy: jax.Array | None
    argmax: jax.Array | None


@checked
def token_log_probs(
    hidden: Float[Array, "N D"] | Float[Array, "B T D"],
    weight: Float[Array, "K L"],
    labels: Int[Array, " N"] | Int[Array, "B T"],
    *,
    mask: Bool[Array, " N"] | Bool[Array, "B T"] | None = None,
    vocab_axis: int = 1,
    temperature: float = 1.0,
    soft_cap: float = 0.0,
    return_entropy: bool = True,
    return_argmax: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> TokenLogProbs:
    """What a vocabulary head says about one token a row, in memory that does not grow with N V.

        z_nv = sum_d hidden_nd weight_dv        x_nv = soft_cap tanh(z_nv / soft_cap) / temperature
        lse_n = log sum_v e^x_nv                logp_n = x_n,label - lse_n
        p_nv = e^(x_nv - lse_n)                 H_n = - sum_v p_nv log p_nv

    logp, lse and H have gradients to hidden and weight; the backward pass recomputes the logits in blocks and saves
    lse and H only. Products take their operands in hidden's dtype, to which the weight is cast, and everything else is
    float32 (float64 for float64): the gradient of a float32 weight is not rounded to a bfloat16 hidden's precision.

    Args:
        hidden: [N, D] or [B, T, D], any float dtype.
        weight: [D, V], or [V, D] with vocab_axis=0 (an embedding used as head), any float dtype.
        labels: [N] or [B, T], integers. A negative label is a row that does not count; one of V or more gives NaN.
        mask: False where a row does not count. Such rows give logp = lse = H = 0 and argmax = -1, and gradients of
            exactly zero, whatever hidden holds there (NaN included).
        vocab_axis: the weight's axis of size V.
        temperature: divides the logits (a number).
        soft_cap: 0 for none.
        return_entropy, return_argmax: leave out what is not needed; the rest then costs less.
        implementation: "pallas_tpu", "pallas_gpu", "blockwise", "reference" (dense), or None for the platform's best.
        block_sizes: rows and tokens of a block, chosen by the implementation by default; "reference" has none.

    Returns:
        TokenLogProbs of arrays in labels' shape.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive, or an implementation that does not
            exist or cannot run here.

    Under `jax.set_mesh`, batch is split over ("data", "fsdp"), length over "sequence" and the vocabulary over "tensor";
    rows [N] count as batch; see `kernels.log_prob.sharded`. "reference" is left to the partitioner.
    """
    arguments, counted = canonicalize(
        hidden, weight, labels, mask=mask, vocab_axis=vocab_axis, temperature=temperature, soft_cap=soft_cap,
        entropy=return_entropy, argmax=return_argmax, block_sizes=block_sizes,
    )  # fmt: skip
    logp, lse, entropy, argmax = dispatch.run(IMPLEMENTATIONS, implementation, arguments)
    V = weight.shape[arguments.options.vocab_axis]
    outputs = TokenLogProbs(
        jnp.where(counted, jnp.where(arguments.labels < V, logp, jnp.nan), 0),
        jnp.where(counted, lse, 0),
        None if entropy is None else jnp.where(counted, entropy, 0),
        None if argmax is None else jnp.where(counted, argmax, -1),
    )
    return jax.tree.map(lambda x: x.reshape(labels.shape), outputs)
