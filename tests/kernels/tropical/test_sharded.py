"""Tropical operations with time split over a mesh equal one device: outputs, states and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels import pallas
from kernels.tropical import attention, linear, maxplus_linear_attention, scan, tropical_attention
from tests.kernels.contract import Case, packed
from tests.kernels.meshes import assert_equals_one_device, mesh_of
from tests.kernels.tropical.contracts import AttentionContract, LinearContract, ScanContract, starts


class Winnerless(LinearContract):
    """With winners the sequence stays whole."""

    def call(self, case, implementation, operands):
        c, state = maxplus_linear_attention(
            **operands, mask=self.mask(case), return_state=True, implementation=implementation
        )
        return {"context": c, "state": state}


ATTENTION, LINEAR, WINNERS, SCAN = AttentionContract(), Winnerless(), LinearContract(), ScanContract()
STATE = {"decay": True, "state": True}


@pytest.mark.parametrize(
    ("contract", "case"),
    [
        (ATTENTION, Case(24, 24, H=4, mask=packed(24, 24), options={"bias": "full", "slopes": True})),
        (LINEAR, Case(24, 24, H=4, mask=packed(24, 24), options=STATE)),
        (SCAN, Case(24, 24, H=4, mask=packed(24, 24), options={"state": True})),
    ],
)
def test_time_is_split_too(contract, case):
    assert_equals_one_device(contract, case, (1, 1, 4, 2))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("contract", "shape", "case"),
    [
        (ATTENTION, (2, 1, 4, 1), Case(32, 32, K=1, options={"score": "hilbert_asym", "bias": "keys"})),
        (ATTENTION, (1, 1, 8, 1), Case(32, 32, mask={"window": 7}, options={"score": "maxplus_dot"})),
        (ATTENTION, (1, 1, 4, 1), Case(16, 32, mask={"causal": False, "lengths": np.array([31, 19])})),
        (ATTENTION, (1, 1, 4, 1), Case(16, 31, mask=starts(3, 20), options={"smooth_beta": 2.0, "bias": "full"})),
        (LINEAR, (2, 1, 4, 1), Case(32, 32, K=1, options=STATE)),
        (LINEAR, (1, 1, 8, 1), Case(32, 32, B=3, H=4, mask=starts(0, 15, 32), options={"decay": True})),
        (WINNERS, (1, 1, 4, 1), Case(32, 32, options=STATE)),
        (SCAN, (2, 1, 4, 1), Case(32, 32, options={"state": True})),
        (SCAN, (1, 1, 8, 1), Case(32, 32, B=3, mask=starts(0, 15, 32), options={"state": True})),
    ],
)  # fmt: skip
def test_every_mask_and_option(contract, shape, case):
    assert_equals_one_device(contract, case, shape)


@pytest.mark.thorough
@pytest.mark.parametrize("contract", [ATTENTION, LINEAR, SCAN])
def test_meshes_that_track_shardings(contract):
    options = {} if contract is ATTENTION else {"state": True}
    case = Case(32, 32, H=4, mask=packed(32, 32), options=options)
    assert_equals_one_device(contract, case, (1, 1, 4, 2), kind=AxisType.Explicit)


def test_the_lowest_index_wins_ties_across_devices():
    """Whole numbers from few: most winners are tied with keys of other shards, and the first one has the gradient."""
    r = np.random.default_rng(0)
    q, k, v = (jnp.asarray(r.integers(0, 2, size=(1, 16, 2, 3)), jnp.float32) for _ in range(3))

    def loss(q, k, v):
        c, _, winners = tropical_attention(
            q, k, v, devaluation="none", return_context=True, return_winners=True
        )
        return (c * jnp.arange(c.size).reshape(c.shape)).sum(), (c, winners)

    run = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    want = jax.jit(run)(q, k, v)
    with jax.set_mesh(mesh_of((1, 1, 4, 1))):
        got = jax.jit(lambda *x: run(*x))(q, k, v)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("contract", "implementation"),
    [
        (contract, each.name)
        for contract, room in ((ATTENTION, attention), (LINEAR, linear), (SCAN, scan))
        for each in room.IMPLEMENTATIONS
    ],
)
def test_every_implementation_runs_inside(contract, implementation):
    options = {} if contract is ATTENTION else {"state": True}
    with pallas.interpreted():
        case = Case(32, 32, mask=packed(32, 32), options=options)
        assert_equals_one_device(contract, case, (1, 1, 2, 1), implementation=implementation)
