"""Softplus attention on eight devices equals one device, outputs and every gradient."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from tests.kernels.contract import Case, packed, relative_error
from tests.kernels.softplus.contract import SoftplusContract

AXES = ("data", "fsdp", "sequence", "tensor")


class Sharded(SoftplusContract):
    implementation = "blockwise"


@pytest.mark.parametrize(("shape", "K"), [((2, 2, 1, 2), 1), ((1, 2, 2, 2), 4)])
def test_equals_one_device(shape, K):
    rows = {name: np.tile(x, (4, 1)) for name, x in packed(21, 21).items()}
    case = Case(
        21, 21, B=8, H=4, K=K, mask=rows | {"starts": np.arange(8, dtype=np.int32)}, options={"learned": True}
    )
    contract = Sharded()
    operands = contract.draw(case, np.float32)
    want, want_gradients = contract.evaluate(case, "reference", operands)
    with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 4)):
        got, gradients = contract.evaluate(case, "blockwise", operands)
    assert relative_error(got["o"], want["o"]) < 1e-5
    assert set(gradients) == {"q", "k", "v", "gain", "power"}
    for name, x in gradients.items():
        assert relative_error(x, want_gradients[name]) < 1e-4, name
