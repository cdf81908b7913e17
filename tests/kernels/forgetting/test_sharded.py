"""Forgetting attention on eight devices equals one device, outputs and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from tests.kernels.contract import packed
from tests.kernels.forgetting.contract import Case, assert_near, operands, value_and_gradients

AXES = ("data", "fsdp", "sequence", "tensor")


def packed_case(B, H, K):
    rows = {name: np.tile(x, (B // 2, 1)) for name, x in packed(21, 21).items()}
    return Case(21, 21, B=B, H=H, K=K, mask={**rows, "starts": np.arange(B, dtype=np.int32)},
                options={"acp_threshold": -6.0})  # fmt: skip


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
    case = packed_case(8, 4, K)
    arrays, cotangents = operands(case, np.float32)
    expected = value_and_gradients(case, "reference", arrays, cotangents)
    mesh = Mesh(np.array(jax.devices()).reshape(shape), AXES, axis_types=(kind,) * 4)
    with jax.set_mesh(mesh):
        actual = value_and_gradients(case, "blockwise", [jnp.asarray(x) for x in arrays], cotangents)
    for name, x, y in [("o", actual[0], expected[0]), ("lse", actual[1], expected[1])]:
        assert_near(x, y, 1e-5, name)
    for name in expected[2]:
        assert_near(actual[2][name], expected[2][name], 1e-5, name)
