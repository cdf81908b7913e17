"""The TPU kernels of the max-plus operations, simulated: the contracts, ties, races and unwritten memory, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas
from kernels.tropical import maxplus_matmul, tropical_attention
from tests.kernels.tropical.simulated import (
    TIES,
    TIES_THOROUGH,
    SimulatedAttention,
    SimulatedLinear,
    SimulatedScan,
    ThoroughAttention,
    ThoroughLinear,
    ThoroughScan,
    assert_ties_are_those_of_the_reference,
)

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


class TestAttention(SimulatedAttention):
    implementation = "pallas_tpu"


class TestScan(SimulatedScan):
    implementation = "pallas_tpu"


class TestLinear(SimulatedLinear):
    implementation = "pallas_tpu"


@pytest.mark.thorough
class TestAttentionThoroughly(ThoroughAttention):
    implementation = "pallas_tpu"


@pytest.mark.thorough
class TestScanThoroughly(ThoroughScan):
    implementation = "pallas_tpu"


@pytest.mark.thorough
class TestLinearThoroughly(ThoroughLinear):
    implementation = "pallas_tpu"


@pytest.mark.parametrize(
    "name", [*TIES, *(pytest.param(name, marks=pytest.mark.thorough) for name in TIES_THOROUGH)]
)
def test_ties_go_to_the_lowest_index_to_the_bit(name):
    assert_ties_are_those_of_the_reference("pallas_tpu", name)


@pytest.mark.parametrize("name", ["scan", *(pytest.param(name, marks=pytest.mark.thorough)
                                            for name in ("hilbert", "product", "linear"))])  # fmt: skip
def test_no_races_no_unwritten_memory_and_nothing_out_of_bounds(name):
    assert_ties_are_those_of_the_reference("pallas_tpu", name, STRICT)


@pytest.mark.smoke
def test_a_product_by_hand():
    a, b = jnp.array([[0.0, 2.0], [-jnp.inf, -jnp.inf]]), jnp.array([[3.0, 1.0], [1.0, -1.0]])
    with pallas.interpreted():
        c, j = maxplus_matmul(a, b, return_winners=True, implementation="pallas_tpu")
    np.testing.assert_array_equal(c, [[3, 1], [-np.inf, -np.inf]])
    np.testing.assert_array_equal(j, [[0, 0], [-1, -1]])


def test_smooth_maxima_are_refused_by_name_and_run_by_default():
    q = jnp.zeros((1, 2, 1, 3))
    with pallas.interpreted(), pytest.raises(ValueError, match="smooth maxima .* are another algorithm"):
        tropical_attention(q, q, q, smooth_beta=2.0, implementation="pallas_tpu")
    assert tropical_attention(q, q, q, smooth_beta=2.0).shape == q.shape


def test_head_sizes_beyond_the_memory_are_refused():
    q = jnp.zeros((1, 2, 1, 257))
    with pallas.interpreted(), pytest.raises(ValueError, match="D=257, Dv=257: .* do not fit VMEM"):
        tropical_attention(q, q, q, implementation="pallas_tpu")
