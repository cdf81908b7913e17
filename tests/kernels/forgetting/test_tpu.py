"""The TPU kernels of forgetting attention, simulated: the contract, races and unwritten memory, precision, what is
skipped and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas
from kernels.forgetting import BlockSizes, Mask, forgetting_attention
from tests.kernels.contract import packed
from tests.kernels.forgetting.contract import (
    CASES,
    SMALL,
    Case,
    Contract,
    assert_near,
    operands,
    value_and_gradients,
)

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


class Simulated(Contract):
    implementation = "pallas_tpu"
    test_in_float64_they_match_to_its_rounding = None  # refused

    @pytest.fixture(autouse=True)
    def simulated(self):
        with pallas.interpreted():
            yield


class TestTpu(Simulated):
    """A packed row and a pruned chunk; the rest of the contract is thorough."""

    cases = {name: CASES[name] for name in ("segments", "pruned")}


for _name in (
    "test_compiled_mapped_rematerialised_and_exported_are_the_same",
    "test_numpy_operands_and_implementation_names",
    "test_vmap_over_a_traced_offset",
    "test_causality_by_exact_zeros",
    "test_packed_documents_are_isolated_by_exact_zeros",
    "test_window_by_exact_zeros",
    "test_unread_gates_change_nothing_and_get_zero_gradient",
):
    setattr(TestTpu, _name, None)


@pytest.mark.thorough
class TestTpuThoroughly(Simulated):
    cases = {name: case for name, case in CASES.items() if name not in TestTpu.cases}


STRICT_CASES = {
    "grouped": Case(35, 43, H=2, K=1, B=1, mask={"q_offset": 8, **packed(35, 43, 8, B=1)},
                    options={"block_sizes": SMALL}),
    "pruned": Case(32, 32, B=1, options={"block_sizes": SMALL, "acp_threshold": -6.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["grouped", pytest.param("pruned", marks=pytest.mark.thorough)])
def test_no_races_no_unwritten_memory_and_nothing_out_of_bounds(name):
    case = STRICT_CASES[name]
    arrays, cotangents = operands(case, np.float32)
    expected = value_and_gradients(case, "reference", arrays, cotangents)
    with pallas.interpreted(STRICT):
        actual = value_and_gradients(case, "pallas_tpu", arrays, cotangents)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_near(x, y, 3e-5, name)


@pytest.mark.smoke
def test_a_row_of_two_keys():
    x, log_f = jnp.arange(1.0, 3).reshape(1, 2, 1, 1), jnp.full((1, 2, 1), -0.5)
    with pallas.interpreted():
        o = forgetting_attention(x, x, x, log_f, implementation="pallas_tpu")
    weight = 1 / (1 + np.exp(2 - 0.5 - 4))
    np.testing.assert_allclose(o[0, :, 0, 0], [1, 1 + weight], rtol=1e-6)


def long(T, log_f, D=16):
    r = np.random.default_rng(0)
    q, k, v = (r.normal(size=(1, T, 1, D)) for _ in range(3))
    return q, k, v, log_f(r, (1, T, 1))


@pytest.mark.parametrize("resets", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_pairs_of_floats_are_precise_where_a_single_sum_is_not(resets):
    """Sums of gates down to thousands, and gates of -1e4 that cut the row: as exact as if there were none."""
    T = 1024

    def gates(r, shape):
        log_f = -np.log1p(np.exp(-r.normal(-2.0, 1.0, size=shape)))
        return np.where(r.random(shape) < 0.02, -1e4, log_f) if resets else log_f

    arrays = long(T, gates)
    single = [x.astype(np.float32) for x in arrays]

    def run(arrays, implementation, **options):
        def loss(*arrays):
            o = forgetting_attention(*arrays, implementation=implementation, **options)
            return (o * jnp.cos(jnp.arange(T))[:, None, None]).sum(), o

        gradients, o = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arrays)
        return o, *gradients

    with jax.enable_x64(True):
        exact = run([x.astype(np.float64) for x in single], "blockwise")
    with pallas.interpreted():
        found = run(single, "pallas_tpu", block_sizes=BlockSizes(256, 256))
    for x, y in zip(found, exact, strict=True):
        assert_near(x, y, 2e-5, f"{resets=}")
    if resets:
        with pallas.interpreted():
            loose = run(single, "pallas_tpu", block_sizes=BlockSizes(256, 256), decay_mode="global")[0]
        assert np.abs(np.asarray(loose) - np.asarray(exact[0])).max() > 1e-3


def test_blocks_out_of_reach_are_not_computed():
    """NaN in values that only skipped blocks hold cannot reach the output: skipped, not masked."""
    T, sizes = 64, BlockSizes(16, 8)
    q, k, v, log_f = (x.astype(np.float32) for x in long(T, lambda r, shape: -np.ones(shape), D=4))
    old, new, middle = v.copy(), v.copy(), v.copy()
    old[:, :8], new[:, 48:], middle[:, :24] = np.nan, np.nan, np.nan

    def rows(v, mask=Mask(), **options):  # noqa: B008 (frozen)
        with pallas.interpreted():
            return forgetting_attention(
                q, k, v, log_f, mask=mask, block_sizes=sizes, implementation="pallas_tpu", **options
            )[0, :, 0, 0]

    assert np.all(np.isfinite(rows(new)[:48]))
    assert np.all(np.isfinite(rows(old, Mask(window=9))[16:]))
    segments = jnp.asarray(np.arange(T) // 24 + 1)[None]
    assert np.all(np.isfinite(rows(middle, Mask(q_segments=segments, kv_segments=segments))[32:]))
    assert np.all(np.isfinite(rows(middle, Mask(starts=jnp.array([24])))[24:]))
    pruned = rows(old, acp_threshold=-20.0)
    assert np.all(np.isfinite(pruned[32:])) and np.any(np.isnan(pruned[8:16]))


def test_what_is_refused_says_why():
    x = jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float32)

    def run(x):
        return forgetting_attention(x, x, x, implementation="pallas_tpu")

    with pytest.raises(ValueError, match="it is compiled for tpu and this is cpu"):
        jax.eval_shape(run, x)
    refused = pytest.raises(ValueError, match="TPU kernels have no float64; cast to float32")
    with jax.enable_x64(True), pallas.compiling_for("tpu"), refused:
        jax.eval_shape(run, jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float64))
