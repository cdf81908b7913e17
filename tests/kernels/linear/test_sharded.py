"""Linear attention with time split over a mesh equals one device: outputs, states and every gradient."""

import numpy as np
import pytest
from jax.sharding import AxisType

from kernels import pallas
from kernels.linear import IMPLEMENTATIONS
from tests.kernels.contract import Case, packed
from tests.kernels.linear.contract import GIVEN, NUMERATOR, Contract
from tests.kernels.meshes import assert_equals_one_device


class Mild(Contract):
    """Decays so slow that much is left of a state after a shard."""

    def operands(self, case, rng):
        return {n: 0.02 * x if "decay" in n else x for n, x in super().operands(case, rng).items()}


SHARDED = Mild()


def assert_equal(case, shape, **options):
    assert_equals_one_device(SHARDED, case, shape, **options)


def test_the_state_is_carried():
    """Turned by the angle, decayed, and dropped where a document ends."""
    case = Case(24, 24, H=4, K=2, mask=packed(24, 24), options={"angle": 0.1, "decay": "number", **GIVEN})
    assert_equal(case, (1, 1, 4, 2))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((2, 1, 4, 1), Case(32, 32, K=1, options={"angle": 0.1, "chunk_size": 3})),
        ((1, 1, 8, 1), Case(32, 32, mask=packed(32, 32), options={"decay": "key", **GIVEN})),
        ((1, 1, 4, 2), Case(32, 32, H=4, K=1, options={"decay": "key value", **GIVEN, **NUMERATOR})),
        ((1, 1, 4, 1), Case(32, 32, mask={"starts": np.array([0, 13]), "lengths": np.array([32, 19])},
                            options={"learned_angle": True, **GIVEN})),
        # rows alone: all keys, or queries that do not stand beside their keys
        ((1, 1, 4, 1), Case(16, 31, mask={"causal": False, "lengths": np.array([31, 19])},
                            options={"angle": 0.1, **GIVEN})),
        ((1, 1, 4, 1), Case(16, 31, mask={"q_offset": np.int32(12)},
                            options={"angle": 0.1, "decay": "number", **GIVEN})),
        ((1, 1, 4, 1), Case(16, 31, mask={"q_offset": 15, **packed(16, 31, 15)}, options={"angle": 0.1})),
    ],
)  # fmt: skip
def test_every_mask_and_option(shape, case):
    assert_equal(case, shape)


@pytest.mark.thorough
def test_meshes_that_track_shardings():
    case = Case(32, 32, mask=packed(32, 32), options={"angle": 0.1, **GIVEN})
    assert_equal(case, (1, 1, 4, 2), kind=AxisType.Explicit)


@pytest.mark.thorough
@pytest.mark.parametrize("implementation", [each.name for each in IMPLEMENTATIONS])
def test_every_implementation_runs_inside(implementation):
    with pallas.interpreted():
        case = Case(32, 32, mask=packed(32, 32), options={"angle": 0.1, **GIVEN})
        assert_equal(case, (1, 1, 2, 1), implementation=implementation)
