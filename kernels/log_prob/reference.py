"""The definition: all logits at once, softmax and entropy as written. Memory N V; for checking and for small sizes.

Letters: B batch, T length, D hidden size, V vocabulary.
"""

import jax
import jax.numpy as jnp

from kernels.log_prob.arguments import Arguments, Outputs


def reference(arguments: Arguments) -> Outputs:
    """logp, lse, entropy and argmax of logits in the accumulation dtype."""
    hidden, options = arguments.hidden, arguments.options
    wide = jnp.promote_types(jnp.float32, hidden.dtype)
    weight = arguments.weight.astype(hidden.dtype)
    equation = "btd,dv->btv" if options.vocab_axis == 1 else "btd,vd->btv"
    z = jnp.einsum(equation, hidden, weight, precision="highest", preferred_element_type=wide)
    x = options.logits(z)
    log_p = jax.nn.log_softmax(x, axis=-1)
    label = jnp.maximum(arguments.labels, 0)[..., None]
    return Outputs(
        jnp.take_along_axis(log_p, label, axis=-1, mode="clip")[..., 0],
        jax.nn.logsumexp(x, axis=-1),
        -jnp.sum(jnp.exp(log_p) * log_p, axis=-1) if options.entropy else None,
        jnp.argmax(x, axis=-1).astype(jnp.int32) if options.argmax else None,
    )
