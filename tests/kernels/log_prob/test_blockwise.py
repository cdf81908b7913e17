"""The blockwise implementation: the contract, any block sizes, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.log_prob import BlockSizes, token_log_probs
from tests.kernels.forgetting.test_blockwise import largest_array
from tests.kernels.log_prob.contract import LogProbContract, head


class TestBlockwise(LogProbContract):
    implementation = "blockwise"
    cases = {
        "one": head(1, 2, B=1, D=1),
        "default": head(7, 61),
        "blocks": head(13, 29, (8, 7), vocab_axis=0, absent=True),
        "whole_blocks": head(8, 30, (4, 10), temperature=0.7, soft_cap=20.0),
        "no_entropy": head(31, 23, (16, 16), return_entropy=False),
        "only_entropy": head(11, 17, (5, 64), return_argmax=False, temperature=2.5),
    }


@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (26, 19), (100, 100)])
def test_any_block_sizes_give_the_same(sizes):
    contract, case = LogProbContract(), head(13, 19, sizes, soft_cap=2.0)
    with jax.enable_x64(True):
        x = contract.draw(case)
        got, want = contract.evaluate(case, "blockwise", x), contract.evaluate(case, "reference", x)
        contract.compare(got, want, 1e-12, 1e-12, f"{sizes=}")


def test_no_array_holds_rows_times_vocabulary():
    N, D, V = 4096, 8, 8192
    operands = jnp.ones((N, D)), jnp.ones((D, V)), jnp.zeros(N, jnp.int32)

    def largest(implementation):
        def loss(h, w, labels):
            out = token_log_probs(h, w, labels, return_argmax=True, implementation=implementation)
            return out.logp.sum() + out.entropy.sum()

        return max(largest_array(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(*operands).jaxpr))

    assert largest("blockwise") <= 512 * 1024 and largest("reference") >= N * V


def test_a_float32_weight_gets_a_gradient_that_is_not_rounded_to_bfloat16():
    """dw is summed in float32, and left so: a gradient of bfloat16 operands has more than eight bits."""
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(40, 16)), jnp.bfloat16)
    w, labels = jnp.asarray(rng.normal(size=(16, 30)), jnp.float32), jnp.arange(40) % 30
    dw = jax.grad(lambda w: token_log_probs(h, w, labels, block_sizes=BlockSizes(16, 16)).logp.sum())(w)
    assert dw.dtype == jnp.float32 and np.any(dw != dw.astype(jnp.bfloat16).astype(jnp.float32))
