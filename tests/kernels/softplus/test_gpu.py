"""The GPU kernels of softplus attention, simulated: the contract, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import pallas
from kernels.softplus import BlockSizes, softplus_attention
from tests.kernels.softplus.contract import CASES, SimulatedContract


class TestGpu(SimulatedContract):
    implementation = "pallas_gpu"
    cases = {"sixty_three": CASES["sixty_three"]}


@pytest.mark.thorough
class TestGpuThoroughly(TestGpu):
    cases = {name: case for name, case in CASES.items() if name != "sixty_three"}


@pytest.mark.smoke
def test_a_row_of_two_keys():
    x = jnp.arange(1.0, 3).reshape(1, 2, 1, 1)
    with pallas.interpreted():
        o = softplus_attention(x, x, x, 1.0, implementation="pallas_gpu")
    a = np.log1p(np.exp(np.log(2) * 2 * np.array([1, 2])))
    np.testing.assert_allclose(o[0, :, 0, 0], [1, (a[0] + 2 * a[1]) / a.sum()], rtol=1e-6)


def test_what_is_refused_says_why():
    def run(x, **options):
        return softplus_attention(x, x, x, implementation="pallas_gpu", **options)

    with pallas.compiling_for("cuda"):
        with pytest.raises(ValueError, match="q=48, k=8 must be powers of two of at least 16"):
            run(jnp.ones((1, 4, 1, 8)), block_sizes=BlockSizes(48, 8))
        with pytest.raises(ValueError, match="D=320, Dv=320 pass 256"):
            jax.eval_shape(run, jax.ShapeDtypeStruct((1, 4, 1, 320), jnp.float32))
