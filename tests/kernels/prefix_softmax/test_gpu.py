"""The GPU kernels of prefix softmax, simulated: the contract, several chunks, logits of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import pallas
from kernels.prefix_softmax import prefix_softmax
from tests.kernels.contract import packed
from tests.kernels.prefix_softmax.contract import CASES, PrefixContract, square

CHUNKS = {
    "chunks": square(70, H=2, K=1, B=2, Dv=20, mask=packed(70, 70), options={"chunk_size": 16}),
    "channels": square(70, H=3, K=1, Dv=1, mask=packed(70, 70), options={"chunk_size": 32}),
    "channels_continued": square(45, Dv=1, options={"chunk_size": 16, "initial": True}),
}


class Simulated(PrefixContract):
    implementation = "pallas_gpu"
    test_in_float64_they_match_to_its_rounding = None  # refused

    @pytest.fixture(autouse=True)
    def simulated(self):
        with pallas.interpreted():
            yield


class TestGpu(Simulated):
    cases = {"chunks": CHUNKS["chunks"]}
    test_numpy_operands_and_implementation_names = pytest.mark.thorough(
        PrefixContract.test_numpy_operands_and_implementation_names
    )
    test_compiled_mapped_rematerialised_and_exported_are_the_same = pytest.mark.thorough(
        PrefixContract.test_compiled_mapped_rematerialised_and_exported_are_the_same
    )


@pytest.mark.thorough
class TestGpuThoroughly(Simulated):
    cases = CASES | {name: CHUNKS[name] for name in ("channels", "channels_continued")}


@pytest.mark.parametrize("value_size", [2, 1])
def test_logits_of_any_size(value_size):
    """Sums of e^s would overflow at 88."""
    case, contract = square(140, H=2, K=2, Dv=value_size), PrefixContract()
    x = contract.draw(case, np.float32)
    x["s"] *= np.float32(1e29)
    with jax.enable_x64(True):
        want = contract.evaluate(case, "reference", {n: a.astype(np.float64) for n, a in x.items()})
        want = jax.tree.map(np.asarray, want)
    with pallas.interpreted():
        got = contract.evaluate(case, "pallas_gpu", x)
    contract.compare(got, want, 2e-6, 2e-6, "large")


@pytest.mark.smoke
@pytest.mark.parametrize("value_size", [2, 1])
def test_two_keys(value_size):
    s, v = jnp.array([[[0.0], [1.0]]]), jnp.arange(2.0)[None, :, None, None] * jnp.ones(value_size)
    with pallas.interpreted():
        o = prefix_softmax(s, v, implementation="pallas_gpu")
    np.testing.assert_allclose(o[0, :, 0, 0], [0, 1 / (1 + np.exp(-1))], rtol=1e-6)


def test_float64_is_refused_with_the_way_out():
    with jax.enable_x64(True), pallas.interpreted(), pytest.raises(ValueError, match="cast them to float32"):
        prefix_softmax(np.zeros((1, 2, 1)), np.zeros((1, 2, 1, 2)), implementation="pallas_gpu")
