"""The linear form: the contract, any chunk size, and that neither time nor memory is quadratic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.linear import Mask, linear_attention
from tests.kernels.contract import Case, relative_error
from tests.kernels.linear.contract import Contract


class TestBlockwise(Contract):
    implementation = "blockwise"


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_any_chunk_size_gives_the_same(chunk_size):
    segments = np.array([[1] * 4 + [2] * 9, [0] * 2 + [3] * 11], np.int32)
    mask = {"q_segments": segments, "kv_segments": segments}
    contract, name = Contract(), {"chunk_size": chunk_size}
    case = Case(13, 13, K=1, mask=mask, options={"angle": 0.1, "given_state": True} | name)
    with jax.enable_x64(True):
        operands = contract.draw(case)
        got = contract.evaluate(case, "blockwise", operands)
        want = contract.evaluate(case, "reference", operands)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert relative_error(x, y) < 1e-12


def gradient_program(T, implementation, mask=None, **options):
    def loss(q, k, v):
        mask_here = Mask() if mask is None else mask
        decays = {name: -jnp.abs(k) for name in options.get("decays", ())}
        num, den = linear_attention(
            q, k, v, mask=mask_here, angle=1e-3, implementation=implementation, **decays
        )
        return (num.sum(-1) * den).sum()

    x = jnp.zeros((1, T, 2, 16))
    return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x[:, :, :1], x[:, :, :1]).jaxpr


def cost(jaxpr):
    """FLOPs of all matrix products, loops counted as often as they run, and the size of the largest array."""
    flops = largest = 0
    for equation in jaxpr.eqns:
        largest = max([largest, *(v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))])
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            flops += 2 * equation.outvars[0].aval.size * math.prod(shape[n] for n in contracted)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                of_inner = cost(inner)
                flops += of_inner[0] * equation.params.get("length", 1)
                largest = max(largest, of_inner[1])
    return flops, largest


def test_time_is_linear_and_that_of_the_reference_is_quadratic():
    for implementation, growth in (("blockwise", 8), ("reference", 64)):
        short, long = (cost(gradient_program(T, implementation))[0] for T in (1024, 8192))
        assert 0.9 * growth < long / short < 1.01 * growth, implementation


@pytest.mark.parametrize(
    "fields", [{}, {"q_segments": 1}, {"causal": False}, {"causal": False, "q_segments": 1}, {"q_offset": 7}]
)
def test_no_array_is_quadratic(fields):
    T = 2048
    if "q_segments" in fields:
        fields = fields | dict.fromkeys(("q_segments", "kv_segments"), jnp.ones((1, T), jnp.int32))
    assert cost(gradient_program(T, "blockwise", Mask(**fields)))[1] < T * T // 4
    assert cost(gradient_program(T, "reference", Mask(**fields)))[1] >= T * T


@pytest.mark.parametrize("fields", [{}, {"q_offset": 7}])
def test_with_decays_nothing_is_quadratic_either(fields):
    """The largest array are the states at the starts of chunks: T / 128 of D x (Dv + 1) numbers a head."""
    flops, largest = cost(gradient_program(2048, "blockwise", Mask(**fields), decays=("log_key_decay",)))
    assert largest < 2048 * 2048 // 4
    twice = cost(gradient_program(4096, "blockwise", Mask(**fields), decays=("log_key_decay",)))
    assert twice[0] < 2.1 * flops and twice[1] <= 2 * largest


def test_states_are_not_repeated_for_query_heads():
    """With 64 query heads of one key/value head, no array is as large as a state a query head."""
    q, k = jnp.zeros((1, 4, 64, 32)), jnp.zeros((1, 4, 1, 32))
    program = jax.make_jaxpr(
        lambda q, k: linear_attention(q, k, k, angle=0.1, return_state=True, implementation="blockwise")
    )(q, k)
    assert cost(program.jaxpr)[1] < 64 * 32 * 32


def test_far_positions_stay_exact():
    """Float32 against float64 where the last keys are 4000 positions from the first."""
    rng = np.random.default_rng(0)
    q, k, v = (np.maximum(rng.normal(size=(1, 4000, 1, 8)), 0) for _ in range(3))

    def run(dtype):
        return jax.jit(lambda *x: linear_attention(*x, angle=math.pi / 8000))(
            *(x.astype(dtype) for x in (q, k, v))
        )

    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, run(np.float64))
    for got, expected in zip(run(np.float32), want, strict=True):
        assert relative_error(got, expected) < 3e-6
