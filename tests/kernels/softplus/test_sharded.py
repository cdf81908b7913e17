"""Softplus attention on a mesh equals one device, outputs and every gradient, time split or whole."""

import numpy as np
import pytest

from kernels import pallas
from kernels.softplus import IMPLEMENTATIONS
from tests.kernels.contract import Case, packed
from tests.kernels.meshes import assert_equals_one_device
from tests.kernels.softplus.contract import SoftplusContract

SHARDED = SoftplusContract()
LSSA = {"power": None}


def assert_equal(case, shape, **options):
    assert_equals_one_device(SHARDED, case, shape, bound=1e-4, **options)


@pytest.mark.parametrize(("shape", "K"), [((2, 2, 1, 2), 1), ((1, 2, 2, 2), 4)])
def test_equals_one_device(shape, K):
    rows = {name: np.tile(x, (4, 1)) for name, x in packed(21, 21).items()}
    mask = rows | {"starts": np.arange(8, dtype=np.int32)}
    assert_equal(Case(21, 21, B=8, H=4, K=K, mask=mask, options={"learned": True}), shape)


@pytest.mark.parametrize("options", [LSSA, {"learned": True}])
def test_time_is_split_too(options):
    """In a ring for one stage, by rows for two."""
    case = Case(
        24, 24, H=4, K=2, mask={**packed(24, 24), "starts": np.array([0, 5], np.int32)}, options=options
    )
    assert_equal(case, (1, 1, 4, 2))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((2, 1, 4, 1), Case(32, 32, K=1, options=LSSA | {"slopes": np.array([0.5, 0.1])})),
        ((1, 1, 8, 1), Case(32, 32, mask={"window": 7, "lengths": np.array([30, 19], np.int32)},
                            options=LSSA | {"phi": "sigmoid", "normalise": "1/n", "log_bias": True})),
        ((1, 1, 4, 1), Case(16, 32, mask={"causal": False, "lengths": np.array([31, 0], np.int32)},
                            options=LSSA | {"phi": "relu", "phi_power": 2, "normalise": "none"})),
        ((1, 1, 4, 1), Case(16, 32, mask={"causal": False}, options=LSSA | {"phi": "exp"})),
        ((1, 1, 4, 2), Case(32, 32, mask=packed(32, 32), options={"power": 15.0, "degenerate": "lssa"})),
        ((1, 1, 4, 1), Case(8, 31, mask={"q_offset": np.int32(20)}, options=LSSA)),
    ],
)  # fmt: skip
def test_every_mask_and_option(shape, case):
    assert_equal(case, shape)


@pytest.mark.thorough
@pytest.mark.parametrize("implementation", [each.name for each in IMPLEMENTATIONS])
def test_every_implementation_runs_inside(implementation):
    with pallas.interpreted():
        assert_equal(
            Case(32, 32, mask=packed(32, 32), options=LSSA), (1, 1, 2, 1), implementation=implementation
        )
