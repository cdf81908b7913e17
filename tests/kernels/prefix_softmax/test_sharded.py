"""Prefix softmax with time split over a mesh equals one device: outputs, states and every gradient."""

import numpy as np
import pytest
from jax.sharding import AxisType

from kernels import pallas
from kernels.prefix_softmax import IMPLEMENTATIONS
from tests.kernels.contract import Case, packed
from tests.kernels.meshes import assert_equals_one_device
from tests.kernels.prefix_softmax.contract import PrefixContract

SHARDED = PrefixContract()
# Padding within a document and over a whole shard of eight.
INTERRUPTED = np.array([[3] * 5 + [0] * 12 + [3] * 2 + [1] * 13, [0] * 32], np.int32)


def assert_equal(case, shape, **options):
    assert_equals_one_device(SHARDED, case, shape, **options)


def test_the_state_is_carried():
    assert_equal(Case(24, 24, H=4, K=2, mask=packed(24, 24)), (1, 1, 4, 2))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((2, 1, 4, 1), Case(32, 32, K=1, options={"chunk_size": 3, "initial": True})),
        ((1, 1, 4, 1), Case(32, 32, mask={"q_segments": INTERRUPTED, "kv_segments": INTERRUPTED})),
        ((1, 1, 8, 1), Case(32, 32, mask={"starts": np.array([0, 13]), "lengths": np.array([32, 19])})),
        ((1, 1, 4, 1), Case(32, 32, mask={"causal": False, **packed(32, 32)})),
    ],
)  # fmt: skip
def test_every_mask_and_option(shape, case):
    assert_equal(case, shape)


@pytest.mark.thorough
def test_meshes_that_track_shardings():
    assert_equal(Case(32, 32, mask=packed(32, 32)), (1, 1, 4, 2), kind=AxisType.Explicit)


@pytest.mark.thorough
@pytest.mark.parametrize("implementation", [each.name for each in IMPLEMENTATIONS])
def test_every_implementation_runs_inside(implementation):
    with pallas.interpreted():
        assert_equal(Case(32, 32, mask=packed(32, 32)), (1, 1, 2, 1), implementation=implementation)
