"""The GPU kernels of linear attention, simulated: the contract, several chunks, decays of any strength, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import pallas
from kernels.linear import linear_attention
from tests.kernels.contract import Case, packed, relative_error
from tests.kernels.linear.contract import CASES, GIVEN, NUMERATOR, Contract

PACKED = {"H": 4, "K": 2, "mask": packed(45, 45)}
CHUNKS = {
    "angle_chunks": Case(45, 45, **PACKED, options={"angle": 0.05, "chunk_size": 16, **GIVEN}),
    "number_chunks": Case(
        45, 45, **PACKED, options={"decay": "number", "angle": 0.1, "chunk_size": 16, **GIVEN}
    ),
    "key_chunks": Case(45, 45, **PACKED, options={"decay": "key", "chunk_size": 16, **GIVEN}),
    "value_chunks": Case(
        45, 45, **PACKED, options={"decay": "value", "chunk_size": 16, **GIVEN, **NUMERATOR}
    ),
    "number_slices": Case(
        20, 20, H=2, K=1, D=70, Dv=66, options={"decay": "number", "angle": 0.1, "chunk_size": 16, **GIVEN}
    ),
    "both_slices": Case(20, 20, H=2, K=1, D=66, Dv=70, options={"decay": "key value", **GIVEN, **NUMERATOR}),
    "both_chunks": Case(35, 35, options={"decay": "key value", "chunk_size": 16, **GIVEN, **NUMERATOR}),
}
QUICK = ("number_chunks", "key_chunks")


class Simulated(Contract):
    implementation = "pallas_gpu"
    test_in_float64_they_match_to_its_rounding = None  # refused

    @pytest.fixture(autouse=True)
    def simulated(self):
        with pallas.interpreted():
            yield


class TestGpu(Simulated):
    cases = {name: CHUNKS[name] for name in QUICK}
    test_bfloat16 = pytest.mark.thorough(Contract.test_bfloat16)
    test_numpy_operands_and_implementation_names = pytest.mark.thorough(
        Contract.test_numpy_operands_and_implementation_names
    )
    test_compiled_mapped_rematerialised_and_exported_are_the_same = pytest.mark.thorough(
        Contract.test_compiled_mapped_rematerialised_and_exported_are_the_same
    )


@pytest.mark.thorough
class TestGpuThoroughly(Simulated):
    cases = CASES | {name: case for name, case in CHUNKS.items() if name not in QUICK}


@pytest.mark.thorough
@pytest.mark.parametrize("decay", ["log_key_decay", "log_value_decay"])
def test_strong_decays_lose_no_digits_of_weak_ones_after_them(decay):
    """Sums of logarithms are never subtracted: after decays of -1e6 those of -0.01 are still exact."""
    g = np.full((1, 40, 1, 3), -0.01)
    g[0, 3:20] = -1e6
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(1, 40, 1, 3)) for _ in range(3))

    def run(dtype, implementation):
        arrays = [x.astype(dtype) for x in (q, k, v)]
        options = {decay: g.astype(dtype), "denominator": False, "implementation": implementation}
        return linear_attention(*arrays, **options)[0][:, 20:]

    with jax.enable_x64(True):
        want = np.asarray(run(np.float64, "reference"))
    with pallas.interpreted():
        assert relative_error(run(np.float32, "pallas_gpu"), want) < 2e-6


@pytest.mark.smoke
def test_two_keys():
    x, g = jnp.arange(1.0, 3).reshape(1, 2, 1, 1), jnp.full((1, 2, 1), -0.5)
    with pallas.interpreted():
        num, den = linear_attention(x, x, x, log_key_decay=g, implementation="pallas_gpu")
    weight = 2 * np.exp(-0.5)
    np.testing.assert_allclose(num[0, :, 0, 0], [1, weight + 8], rtol=1e-6)
    np.testing.assert_allclose(den[0, :, 0], [1, weight + 4], rtol=1e-6)


def test_what_the_tiles_cannot_hold_is_refused():
    wide = np.zeros((1, 2, 1, 129), np.float32)
    with (
        pallas.interpreted(),
        pytest.raises(ValueError, match="features of size 129 or values of size 129 exceed"),
    ):
        linear_attention(wide, wide, wide, implementation="pallas_gpu")
    with pallas.interpreted(), pytest.raises(ValueError, match="features of size 160"):
        x = wide[..., :80]
        linear_attention(x, x, x, angle=np.ones(80, np.float32), implementation="pallas_gpu")
    with jax.enable_x64(True), pallas.interpreted(), pytest.raises(ValueError, match="operands are float64"):
        linear_attention(*[np.zeros((1, 2, 1, 2))] * 3, implementation="pallas_gpu")
