"""The blockwise implementation: the contract, its memory, its precision, and which blocks it visits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting import BlockSizes, Mask, forgetting_attention
from tests.kernels.forgetting.contract import (
    CASES,
    Case,
    Contract,
    assert_near,
    jit,
    operands,
    value_and_gradients,
)


class TestBlockwise(Contract):
    implementation = "blockwise"


@pytest.mark.parametrize(
    ("sizes", "decay_mode"), [((1, 1), "local"), ((7, 3), "global"), ((64, 5), "local"), ((5, 64), "local")]
)
def test_any_block_sizes_give_the_same(sizes, decay_mode):
    options = {"block_sizes": BlockSizes(*sizes), "decay_mode": decay_mode}
    case = Case(13, 29, H=2, K=1, mask={"q_offset": 16, "window": 17}, options=options)
    with jax.enable_x64(True):
        expected = value_and_gradients(case, "reference", *operands(case))
        actual = value_and_gradients(case, "blockwise", *operands(case))
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_near(x, y, 1e-12, f"{sizes=}")


@pytest.mark.parametrize("name", ["sixty_three", "segments", "pruned", "lengths", "no_gates"])
def test_no_array_is_quadratic(name):
    """No intermediate of forward and backward holds T x S elements, at any depth of the program."""
    case = CASES[name]
    T, blocks = 1024, BlockSizes(128, 128)
    r = np.random.default_rng(0)
    mask = {"segments": {"q_segments": np.ones((1, T), np.int32), "kv_segments": np.ones((1, T), np.int32)},
            "lengths": {"lengths": np.array([1000])}}.get(name, {})  # fmt: skip
    arrays = [r.normal(size=(1, T, 1, 16)).astype(np.float32) for _ in range(3)]
    arrays.append(-np.ones((1, T, 1), np.float32) if case.gated else None)

    def loss(arrays, implementation):
        return forgetting_attention(*arrays, mask=Mask(**mask), block_sizes=blocks, implementation=implementation,
                                    acp_threshold="auto" if name == "pruned" else None).sum()  # fmt: skip

    def largest(implementation):
        gradient = jax.make_jaxpr(jax.value_and_grad(lambda a: loss(a, implementation)))(arrays)
        return max(largest_array(gradient.jaxpr))

    assert largest("blockwise") < T * T // 4, largest("blockwise")
    assert largest("reference") >= T * T


def largest_array(jaxpr):
    """Sizes of every intermediate, entering loops, branches and calls."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from largest_array(inner)


def test_log_gates_are_never_narrowed():
    """With bfloat16 operands a change of the gates far below bfloat16's resolution still moves every lse."""
    case = CASES["seven"]
    arrays, _ = operands(case, np.float32)
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:3]]
    lse = jit(lambda g: forgetting_attention(*low, g, return_lse=True, implementation="blockwise")[1])
    moved, still = lse(arrays[3] * np.float32(1 + 2**-12)), lse(arrays[3])
    assert np.all(np.asarray(moved != still)[:, 1:])


def test_local_sums_are_precise_where_a_global_sum_is_not():
    T, D = 4096, 32
    r = np.random.default_rng(0)
    q, k, v = (r.normal(size=(1, T, 1, D)) for _ in range(3))
    log_f = -np.log1p(np.exp(-r.normal(-2.0, 1.0, size=(1, T, 1))))
    single = [x.astype(np.float32) for x in (q, k, v, log_f)]

    def run(arrays, mode):
        return jax.jit(lambda *a: forgetting_attention(*a, decay_mode=mode, implementation="blockwise"))(
            *arrays
        )

    with jax.enable_x64(True):
        exact = np.asarray(run([x.astype(np.float64) for x in single], "local"))
    assert np.abs(run(single, "local") - exact).max() < 5e-5
    assert np.abs(run(single, "global") - exact).max() > 1e-4


def test_blocks_out_of_reach_are_not_computed():
    """NaN in values that only skipped blocks hold cannot reach the output: skipped, not masked."""
    T, sizes = 64, BlockSizes(8, 8)
    r = np.random.default_rng(0)
    q, k, v = (r.normal(size=(1, T, 1, 4)).astype(np.float32) for _ in range(3))
    log_f = -np.ones((1, T, 1), np.float32)
    old, new, middle = v.copy(), v.copy(), v.copy()
    old[:, :8], new[:, 40:], middle[:, :24] = np.nan, np.nan, np.nan

    @jit
    def rows(v, mask):
        return forgetting_attention(q, k, v, log_f, mask=mask, block_sizes=sizes, implementation="blockwise")[
            0, :, 0, 0
        ]

    assert np.all(np.isfinite(rows(new, Mask())[:40]))
    assert np.all(np.isfinite(rows(old, Mask(window=9))[16:]))
    segments = jnp.asarray(np.arange(T) // 24 + 1)[None]
    assert np.all(np.isfinite(rows(middle, Mask(q_segments=segments, kv_segments=segments))[24:]))
    assert np.all(np.isfinite(rows(middle, Mask(starts=jnp.array([24])))[24:]))
    pruned = jit(lambda v: forgetting_attention(q, k, v, log_f, acp_threshold=-20.0, block_sizes=sizes))(old)
    assert np.all(np.isfinite(pruned[0, 32:])) and np.any(np.isnan(pruned[0, 8:16]))
