"""The GPU kernels of forgetting attention, simulated: the contract, pruning, long decays, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import pallas
from kernels.forgetting import BlockSizes, forgetting_attention
from kernels.streaming import gpu
from tests.kernels.forgetting.contract import (
    CASES,
    Case,
    Contract,
    assert_near,
    operands,
    value_and_gradients,
)

SMALLEST = BlockSizes(16, 16)


def resized(case):
    """Its blocks at least as large as a tensor core needs."""
    sizes = {"block_sizes": SMALLEST} if "block_sizes" in case.options else {}
    return dataclasses.replace(case, options=case.options | sizes)


class SimulatedContract(Contract):
    """The contract in blocks of sixteen; what takes long is thorough, and float64 is refused."""

    implementation = "pallas_gpu"
    named = {name: resized(case) for name, case in CASES.items()}
    small = SMALLEST
    test_in_float64_they_match_to_its_rounding = None

    @pytest.fixture(autouse=True)
    def _simulated(self):
        with pallas.interpreted():
            yield


class TestGpu(SimulatedContract):
    """Of every change: two cases, and which keys a row reads."""

    cases = {name: SimulatedContract.named[name] for name in ("sixty_three", "pruned")}
    test_compiled_mapped_rematerialised_and_exported_are_the_same = None
    test_rows_read_visible_keys_only_by_exact_zeros = None
    test_vmap_over_a_traced_offset = None
    test_numpy_operands_and_implementation_names = None
    test_bfloat16 = None


@pytest.mark.thorough
class TestGpuThoroughly(SimulatedContract):
    cases = {name: case for name, case in SimulatedContract.named.items() if name not in TestGpu.cases}
    test_causality_by_exact_zeros = None
    test_packed_documents_are_isolated_by_exact_zeros = None
    test_window_by_exact_zeros = None
    test_unread_gates_change_nothing_and_get_zero_gradient = None


@pytest.mark.thorough
def test_the_three_kernels_prune_the_same_blocks():
    """By default their tiles differ; what is left is that of the reference with the largest of them."""
    case = Case(150, 150, B=1, H=2, K=1, options={"acp_threshold": -2.0})
    arrays, cotangents = operands(case, np.float32)
    arrays[3] = 0.1 * arrays[3]
    tiles = gpu.choose(*arrays[:3], None, rich=False).values()
    unit = BlockSizes(max(x.q for x in tiles), max(x.k for x in tiles))
    assert len({(x.q, x.k) for x in tiles}) > 1 and unit.k < 150
    with pallas.interpreted():
        got = value_and_gradients(case, "pallas_gpu", arrays, cotangents)
    in_units = dataclasses.replace(case, options=case.options | {"block_sizes": unit})
    plain = dataclasses.replace(case, options={})
    want, whole = (value_and_gradients(each, "reference", arrays, cotangents) for each in (in_units, plain))
    assert np.abs(want[0] - whole[0]).max() > 1e-3  # something is pruned
    for name, x, y in zip(("o", "lse", *want[2]), jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_near(x, y, 2e-5, name)


@pytest.mark.thorough
def test_large_sums_of_gates_cost_no_digits():
    """c falls to about -20000, where one float32 of it carries 1e-3; differences of pairs of floats do not."""
    case = Case(256, 256, B=1, D=8, Dv=8)
    (q, k, v, _), _ = operands(case, np.float32)
    log_f = (
        -np.random.default_rng(3).uniform(0, 160, size=(1, 256, 2)) * (np.arange(256) % 4 == 0)[:, None]
        - 0.01
    )

    def attend(*arrays, **options):
        return jax.jit(functools.partial(forgetting_attention, **options))(*arrays)

    with jax.enable_x64(True):
        want = attend(
            *(np.float64(x) for x in (q, k, v)), np.float64(np.float32(log_f)), implementation="reference"
        )
    with pallas.interpreted():
        local, lossy = (
            attend(q, k, v, np.float32(log_f), implementation="pallas_gpu", decay_mode=mode)
            for mode in ("local", "global")
        )
    near, far = (np.abs(np.float64(o) - np.asarray(want)).max() for o in (local, lossy))
    assert near < 5e-6 < 1e-4 < far


def test_what_is_refused_says_why():
    def run(q, gates=None, **options):
        call = functools.partial(forgetting_attention, implementation="pallas_gpu", **options)
        return jax.eval_shape(call, q, q, q, gates)

    q, gates = (
        jax.ShapeDtypeStruct((1, 64, 1, 8), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 64, 1), jnp.float32),
    )
    with pallas.compiling_for("cuda"):
        assert run(q, gates).dtype == jnp.bfloat16
        with pytest.raises(ValueError, match=r"q=16, k=8 must each be one of \[16, 32, 64, 128\]"):
            run(q, gates, block_sizes=BlockSizes(16, 8))
        with pytest.raises(ValueError, match="D=257, Dv=257 do not fit on chip beyond 256"):
            run(jax.ShapeDtypeStruct((1, 64, 1, 257), jnp.bfloat16))
