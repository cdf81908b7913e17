"""The GPU kernels of the max-plus operations, simulated: the contracts, ties, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import pallas
from kernels.tropical import maxplus_linear_attention, maxplus_matmul, tropical_attention
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


class TestAttention(SimulatedAttention):
    implementation = "pallas_gpu"


class TestScan(SimulatedScan):
    implementation = "pallas_gpu"


class TestLinear(SimulatedLinear):
    implementation = "pallas_gpu"


@pytest.mark.thorough
class TestAttentionThoroughly(ThoroughAttention):
    implementation = "pallas_gpu"


@pytest.mark.thorough
class TestScanThoroughly(ThoroughScan):
    implementation = "pallas_gpu"


@pytest.mark.thorough
class TestLinearThoroughly(ThoroughLinear):
    implementation = "pallas_gpu"


@pytest.mark.parametrize(
    "name", [*TIES, *(pytest.param(name, marks=pytest.mark.thorough) for name in TIES_THOROUGH)]
)
def test_ties_go_to_the_lowest_index_to_the_bit(name):
    assert_ties_are_those_of_the_reference("pallas_gpu", name)


@pytest.mark.smoke
def test_a_product_by_hand():
    a, b = jnp.array([[0.0, 2.0], [-jnp.inf, -jnp.inf]]), jnp.array([[3.0, 1.0], [1.0, -1.0]])
    with pallas.interpreted():
        c, j = maxplus_matmul(a, b, return_winners=True, implementation="pallas_gpu")
    np.testing.assert_array_equal(c, [[3, 1], [-np.inf, -np.inf]])
    np.testing.assert_array_equal(j, [[0, 0], [-1, -1]])


@pytest.mark.parametrize(
    ("D", "Dv", "message"), [(4, 257, "Dv=257 is above 256"), (257, 4, "D=257 is above 256")]
)
def test_head_sizes_beyond_the_registers_are_refused(D, Dv, message):
    q, v = jnp.zeros((1, 2, 1, D)), jnp.zeros((1, 2, 1, Dv))
    operation = tropical_attention if Dv > 256 else maxplus_linear_attention
    with pallas.interpreted(), pytest.raises(ValueError, match=message):
        operation(q, q, v, implementation="pallas_gpu")
