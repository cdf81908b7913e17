"""Forgetting attention on a mesh equals one device, outputs and every gradient, time split or whole."""

import numpy as np
import pytest
from jax.sharding import AxisType

from kernels import pallas
from kernels.forgetting import IMPLEMENTATIONS, BlockSizes
from tests.kernels.contract import packed
from tests.kernels.forgetting.contract import Case, Contract
from tests.kernels.meshes import assert_equals_one_device

SHARDED = Contract()


def packed_rows(T, B):
    rows = {name: np.tile(x, (B // 2, 1)) for name, x in packed(T, T).items()}
    return {**rows, "starts": np.arange(B, dtype=np.int32)}


def assert_equal(case, shape, **options):
    assert_equals_one_device(SHARDED, case, shape, **options)


@pytest.mark.parametrize(
    ("shape", "K", "kind"),
    [
        ((8, 1, 1, 1), 2, AxisType.Auto),
        ((1, 4, 1, 2), 2, AxisType.Auto),
        ((2, 2, 1, 2), 1, AxisType.Auto),
        ((1, 2, 2, 2), 4, AxisType.Auto),
        ((2, 2, 1, 2), 1, AxisType.Explicit),
    ],
)
def test_equals_one_device(shape, K, kind):
    case = Case(21, 21, B=8, H=4, K=K, mask=packed_rows(21, 8), options={"acp_threshold": -6.0})
    assert_equal(case, shape, kind=kind)


def test_time_is_split_too():
    """Documents that begin within and between shards, padding, and a window over more than one shard."""
    case = Case(24, 24, H=4, K=2, mask={**packed_rows(24, 2), "window": 9})
    assert_equal(case, (1, 1, 4, 2))


BLOCKS = {"block_sizes": BlockSizes(4, 4)}
PRUNED = {"acp_threshold": np.array([[-2.0, -5.0]]), **BLOCKS}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((2, 1, 4, 1), Case(32, 32)),
        ((1, 1, 8, 1), Case(32, 32, K=1, mask={"window": 7, "lengths": np.array([30, 19], np.int32)})),
        ((1, 1, 4, 2), Case(32, 32, mask=packed(32, 32), options={"decay_mode": "global"})),
        ((1, 1, 4, 1), Case(32, 32, options=PRUNED)),
        ((1, 1, 2, 2), Case(32, 32, mask={**packed(32, 32), "window": 15}, options=PRUNED)),
        ((1, 1, 4, 1), Case(16, 32, gated=False, mask={"causal": False, "lengths": np.array([31, 19], np.int32)})),
        # rows alone: queries that are not the keys' own
        ((1, 1, 4, 2), Case(16, 31, H=4, mask={"q_offset": np.int32(12), "starts": np.array([0, 20], np.int32)})),
        ((1, 1, 4, 1), Case(16, 31, mask={"q_offset": 15}, options=PRUNED)),
        # whole: a step of decoding, and pruning by blocks that are no parts of a shard
        ((1, 1, 4, 1), Case(1, 32, mask={"q_offset": np.int32(20)})),
        ((1, 1, 8, 1), Case(24, 24, options=PRUNED)),
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
        assert_equal(Case(32, 32, H=4, mask=packed(32, 32)), (1, 1, 2, 2), implementation=implementation)
