"""Blockwise streaming attention: the contract, agreement with the forgetting kernel, memory, what it skips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting import forgetting_attention
from kernels.streaming import BlockSizes, DotProduct, Mask, streaming_attention
from tests.kernels.contract import packed
from tests.kernels.streaming.contract import StreamingContract


class TestBlockwise(StreamingContract):
    implementation = "blockwise"


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("kind", ["packed_window", "all_keys"])
def test_the_dot_product_reproduces_softmax_attention_exactly(kind):
    """The same blocks in the same order: outputs and gradients are those of the forgetting kernel, bit for bit."""
    fields = {
        "packed_window": {"window": 11} | {k: jnp.asarray(x) for k, x in packed(37, 37).items()},
        "all_keys": {"causal": False, "lengths": jnp.array([37, 19])},
    }[kind]
    q, k, v = normal(2, 37, 6, 7), normal(2, 37, 3, 7, seed=1), normal(2, 37, 3, 5, seed=2)
    do, scale, mask, sizes = normal(2, 37, 6, 5, seed=3), 7**-0.5, Mask(**fields), BlockSizes(8, 16)

    def ours(q, k, v):
        return streaming_attention(
            DotProduct(scale),
            q,
            k,
            v,
            mask=mask,
            return_lse=True,
            implementation="blockwise",
            block_sizes=sizes,
        )

    def theirs(q, k, v):
        return forgetting_attention(
            q, k, v, mask=mask, scale=scale, return_lse=True, implementation="blockwise", block_sizes=sizes
        )

    def both(attend):
        (o, lse), pull = jax.vjp(attend, q, k, v)
        return o, lse, *pull((do, do[..., 0]))

    for name, got, want in zip(("o", "lse", "dq", "dk", "dv"), jax.jit(both, static_argnums=0)(ours),
                               jax.jit(both, static_argnums=0)(theirs), strict=True):  # fmt: skip
        if name in ("dq", "dk"):  # the factor `scale` is applied per block here, once at the end there
            np.testing.assert_allclose(got, want, atol=2e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(got, want, name)


def test_memory_is_linear_in_the_length():
    """Temporaries of forward and backward grow with T, not with T squared."""

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)

        def loss(q, k, v):
            o = streaming_attention(
                DotProduct(1.0), q, k, v, implementation="blockwise", block_sizes=BlockSizes(64, 64)
            )
            return jnp.sum(o**2)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(1024), temporaries(4096)
    assert large < 4.5 * small and large < 4096 * 4096


def test_invisible_blocks_are_not_computed():
    """A NaN in a key that the block ranges exclude cannot reach the result; in a visited block it would."""
    q, k, v = normal(1, 32, 1, 4), normal(1, 32, 1, 4, seed=1), normal(1, 32, 1, 4, seed=2)
    broken = v.at[:, 24:].set(jnp.nan)
    attend = functools.partial(streaming_attention, DotProduct(1.0), implementation="blockwise")
    o = jax.jit(functools.partial(attend, block_sizes=BlockSizes(8, 8)))(q, k, broken)
    np.testing.assert_array_equal(np.isnan(o[0, :, 0, 0]), np.arange(32) >= 24)


def test_bfloat16_gradients_are_summed_in_float32():
    """1024 equal contributions to one key's gradient: summed in bfloat16 block by block they would be lost."""
    T, rows = 2048, BlockSizes(2, 2)
    q, k = jnp.ones((1, T, 1, 1), jnp.bfloat16), jnp.zeros((1, 2, 1, 1), jnp.bfloat16)
    v = jnp.array([1.0, 0.0], jnp.bfloat16).reshape(1, 2, 1, 1)

    def loss(k):
        o = streaming_attention(
            DotProduct(1.0), q, k, v, mask=Mask(causal=False), implementation="blockwise", block_sizes=rows
        )  # fmt: skip
        return jnp.sum(o.astype(jnp.float32))

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(k).astype(jnp.float32)[0, :, 0, 0], [T / 4, -T / 4])


def test_filling_up_blocks_cannot_bring_in_a_nan():
    """A score that divides by norms is fine as long as no query or key is 0; T = 5 and S = 7 are filled to 8."""

    def cosine(x, rows, cols, of_rows, of_cols, extras):
        return x / jnp.sqrt(of_rows[0] * of_cols[0])

    def loss(q, k):
        squares = (((x**2).sum(-1),) for x in (q, k))
        mask, sizes = Mask(causal=False), BlockSizes(4, 4)
        o = streaming_attention(
            cosine, q, k, k, *squares, mask=mask, implementation="blockwise", block_sizes=sizes
        )
        return jnp.sum(o**2)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(normal(1, 5, 1, 3), normal(1, 7, 1, 3, seed=1))
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in gradients)
