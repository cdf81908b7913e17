"""The chunked implementation: the contract, any chunk size, its memory, and logits of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.prefix_softmax import prefix_softmax
from tests.kernels.forgetting.test_blockwise import largest_array
from tests.kernels.prefix_softmax.contract import PrefixContract, square


class TestBlockwise(PrefixContract):
    implementation = "blockwise"


@pytest.mark.parametrize("size", [1, 3, 29, 1000])
def test_any_chunk_size_gives_the_same(size):
    contract, case = PrefixContract(), square(29, H=4, K=2, options={"chunk_size": size})
    with jax.enable_x64(True):
        x = contract.draw(case)
        got, want = contract.evaluate(case, "blockwise", x), contract.evaluate(case, "reference", x)
        contract.compare(got, want, 1e-12, 1e-12, f"{size=}")


@pytest.mark.parametrize("value_size", [1, 16])
def test_no_array_is_quadratic(value_size):
    """No intermediate of forward and backward holds S x S elements, at any depth of the program."""
    S = 2048
    s, v = np.ones((1, S, 1), np.float32), np.ones((1, S, 1, value_size), np.float32)

    def largest(implementation):
        def loss(s, v):
            return prefix_softmax(s, v, implementation=implementation).sum()

        return max(largest_array(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(s, v).jaxpr))

    assert largest(None) < S * S // 32 and largest("reference") >= S * S


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_logits_of_any_size(size):
    """float32 keeps its digits whatever the logits' size; sums of e^s would overflow at 88."""
    case = square(40, H=2, K=2, options={"chunk_size": 7})
    contract = PrefixContract()
    x = contract.draw(case, np.float32)
    x["s"] *= np.float32(size / 10)
    with jax.enable_x64(True):
        want = contract.evaluate(case, "reference", {n: a.astype(np.float64) for n, a in x.items()})
    got = contract.evaluate(case, "blockwise", x)
    contract.compare(got, want, 2e-6, 2e-6, f"{size=}")
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(got[1]))


def test_logits_of_minus_infinity_are_absent():
    s, v = np.random.default_rng(0).normal(size=(1, 9, 1)).astype(np.float32), np.eye(9, dtype=np.float32)
    s[0, [0, 1, 5]] = -np.inf

    def first(s):
        o = prefix_softmax(s, v[None, :, None], chunk_size=2, implementation="blockwise")
        return o[0, 6].max() + o[0, 8, 0, 8], o

    gradient, o = jax.jit(jax.grad(first, has_aux=True))(jnp.asarray(s))
    a = np.asarray(o[0, :, 0])
    assert np.all(a[:2] == 0) and np.all(a[:, [0, 1, 5]] == 0)
    np.testing.assert_allclose(a[2:].sum(1), 1, rtol=1e-6)
    assert np.all(np.isfinite(gradient)) and np.all(gradient[0, [0, 1, 5]] == 0) and gradient[0, 2] != 0
