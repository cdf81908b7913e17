"""Streaming attention with time split over a mesh equals one device, outputs and every gradient."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import pallas
from kernels.streaming import IMPLEMENTATIONS
from tests.kernels.contract import Case, packed
from tests.kernels.meshes import assert_equals_one_device
from tests.kernels.streaming.contract import Cluttered, StreamingContract

SHARDED = StreamingContract()


@dataclass(frozen=True)
class Absolute(Cluttered):
    """A score that reads positions and not only how far they are apart."""

    def __call__(self, x, rows, cols, of_rows, of_cols, extras):
        s = super().__call__(x, rows, cols, of_rows, of_cols, extras)
        return s + 0.1 * cols.astype(x.dtype) * jnp.sin(rows.astype(x.dtype))


def assert_equal(case, shape, **options):
    assert_equals_one_device(SHARDED, case, shape, **options)


def test_time_is_split_too():
    case = Case(24, 24, H=4, K=2, mask={**packed(24, 24), "window": 9}, options={"score": Absolute()})
    assert_equal(case, (1, 1, 4, 2))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((2, 1, 4, 1), Case(32, 32, K=1, options={"score": Absolute()})),
        ((1, 1, 8, 1), Case(32, 32, mask={"window": 7}, options={"score": Cluttered(True)})),
        ((1, 1, 4, 1), Case(16, 32, mask={"causal": False, "lengths": np.array([31, 19], np.int32)},
                            options={"score": Absolute()})),
        # rows alone: queries that are not the keys' own
        ((1, 1, 4, 1), Case(16, 31, mask={"q_offset": np.int32(12)}, options={"score": Absolute()})),
    ],
)  # fmt: skip
def test_every_mask_and_option(shape, case):
    assert_equal(case, shape)


@pytest.mark.thorough
@pytest.mark.parametrize("implementation", [each.name for each in IMPLEMENTATIONS])
def test_every_implementation_runs_inside(implementation):
    with pallas.interpreted():
        assert_equal(Case(32, 32, options={"score": Absolute()}), (1, 1, 2, 1), implementation=implementation)
