"""The blockwise form of softplus attention: the contract, what it must not hold in memory, and what it skips."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.softplus import BlockSizes, Mask, softplus_attention
from tests.kernels.softplus.contract import SoftplusContract


class TestBlockwise(SoftplusContract):
    implementation = "blockwise"


def largest_array(function, *shapes):
    """Numbers in the largest value of the traced program, loops included."""
    sizes = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            sizes.extend(v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)
    return max(sizes)


def test_memory_is_linear_in_the_length_also_backward_and_with_segments():
    def gradient(q, k, v):
        segments = jnp.ones(q.shape[:2], jnp.int32)
        mask = Mask(q_segments=segments, kv_segments=segments)
        return jax.grad(lambda *x: softplus_attention(*x, None, 15.0, mask=mask).sum(), (0, 1, 2))(q, k, v)

    sizes = [largest_array(gradient, *[(1, T, 2, 8)] * 3) for T in (4096, 8192)]
    assert sizes[1] <= 2 * sizes[0] and sizes[1] < 8192 * 8192 / 100


def test_invisible_blocks_are_never_read():
    """NaN in the keys and values of later blocks would show in every row if they were multiplied by 0."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 16, 2, 5)), jnp.float32) for _ in range(3))
    bad = jnp.where(jnp.arange(16)[:, None, None] < 8, 0, jnp.nan)
    for power in (None, 15.0):
        o = softplus_attention(
            q, k + bad, v + bad, None, power, block_sizes=BlockSizes(8, 8), implementation="blockwise"
        )
        assert np.all(np.isfinite(o[:, :8])) and np.all(np.isnan(o[:, 8:]))
