"""Slot attention composed of the GPU kernels of its parts, simulated: the contract and extreme gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import pallas
from kernels.slots import slot_attention
from tests.kernels.contract import packed, relative_error
from tests.kernels.slots.contract import SlotCase, SlotContract

SMALL = SlotCase(37, 37, H=4, K=2, state=True, mask=packed(37, 37),
                 options={"window": 5, "document_state": "initial", "empty_slots": "mask"})  # fmt: skip


class Simulated(SlotContract):
    implementation = "pallas_gpu"
    tolerance = 3e-5
    test_in_float64_they_match_to_its_rounding = None  # refused

    @pytest.fixture(autouse=True)
    def simulated(self):
        with pallas.interpreted():
            yield


@pytest.mark.thorough
class TestGpu(Simulated):
    cases = {"small": SMALL}
    test_rows_read_visible_keys_only_by_exact_zeros = pytest.mark.thorough(
        SlotContract.test_rows_read_visible_keys_only_by_exact_zeros
    )
    test_bfloat16 = pytest.mark.thorough(SlotContract.test_bfloat16)
    test_numpy_operands_and_implementation_names = pytest.mark.thorough(
        SlotContract.test_numpy_operands_and_implementation_names
    )
    test_compiled_mapped_rematerialised_and_exported_are_the_same = pytest.mark.thorough(
        SlotContract.test_compiled_mapped_rematerialised_and_exported_are_the_same
    )


@pytest.mark.thorough
class TestGpuThoroughly(Simulated):
    cases = SlotContract.cases


@pytest.mark.thorough
def test_strong_gates_lose_no_digits_of_weak_ones_after_them():
    """After gates of exp(-1e6) the decay of the next tokens is still exact."""
    g = np.full((1, 16, 1, 1), -0.01)
    g[0, :8] = -1e6
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(1, 16, 1, 3)) for _ in range(3))
    with jax.enable_x64(True):
        _, want = slot_attention(q, k, v, g, window=0, return_state=True, implementation="reference")
        want = np.asarray(want.value)
    with pallas.interpreted():
        narrow = [x.astype(np.float32) for x in (q, k, v, g)]
        _, got = slot_attention(*narrow, window=0, return_state=True, implementation="pallas_gpu")
    assert relative_error(got.value, want) < 2e-6


@pytest.mark.smoke
def test_one_slot_that_the_first_token_fills_by_half():
    """Its logit is (x / 2) x, and its value half the token's."""
    x = jnp.arange(1.0, 3).reshape(1, 2, 1, 1)
    with pallas.interpreted():
        o = slot_attention(
            x, x, x, jnp.full((1, 2, 1, 1), np.log(0.5)), window=0, implementation="pallas_gpu"
        )
    np.testing.assert_allclose(o[0, :, 0, 0], [0.5, 1.25], rtol=1e-5)


def test_float64_is_refused_with_the_way_out():
    x = np.zeros((1, 2, 1, 2))
    with jax.enable_x64(True), pallas.interpreted(), pytest.raises(ValueError, match="use 'blockwise'"):
        slot_attention(x, x, x, x, window=1, implementation="pallas_gpu")
