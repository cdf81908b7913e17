"""The TPU kernels of softplus attention, simulated: the contract, races and unwritten memory, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas
from kernels.softplus import BlockSizes, Mask, softplus_attention, tpu
from kernels.softplus.fused import most_blocks
from tests.kernels.contract import Case, packed, relative_error
from tests.kernels.softplus.contract import CASES, P15, SimulatedContract

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


class TestTpu(SimulatedContract):
    implementation = "pallas_tpu"
    cases = {"segments": CASES["segments"]}


@pytest.mark.thorough
class TestTpuThoroughly(TestTpu):
    cases = {name: case for name, case in CASES.items() if name != "segments"}

    def test_scores_that_do_not_fit_are_computed_twice(self, monkeypatch):
        """A row of blocks that passes the bound on kept scores."""
        monkeypatch.setattr(tpu, "KEPT", 0)
        for name in ("sixty_three", "sharp_softmax", "traced_chunk"):
            self.test_outputs_and_every_gradient_match_float64(name)

    def test_half_precision_is_computed_in_float32(self):
        case = CASES["segments"]
        x = {name: jnp.asarray(x, jnp.float16) for name, x in self.draw(case, np.float32).items()}
        x["gain"] = x["gain"].astype(jnp.float32)
        got = self.call(case, "pallas_tpu", x)["o"]
        want = self.call(case, "reference", {name: x.astype(jnp.float32) for name, x in x.items()})["o"]
        assert got.dtype == jnp.float16
        assert relative_error(got, want) < 2e-3


class Strict(SimulatedContract):
    implementation = "pallas_tpu"
    cases = {
        "grouped": Case(13, 21, B=1, K=1, mask=packed(13, 21, 8, B=1), options=P15 | {"block_sizes": BlockSizes(8, 8)}),
        "window": Case(19, 19, B=1, mask={"window": 6}, options={"phi": "exp", "block_sizes": BlockSizes(8, 4)}),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["grouped", pytest.param("window", marks=pytest.mark.thorough)])
def test_no_races_no_unwritten_memory_and_nothing_out_of_bounds(name, capfd):
    contract, case = Strict(), Strict.cases[name]
    with pallas.interpreted(STRICT):
        got = contract.evaluate(case, "pallas_tpu", contract.draw(case, np.float32))
    contract.compare(got, contract.truth(name), 2e-5, 3e-4, "strict")
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.smoke
def test_a_row_of_two_keys():
    x = jnp.arange(1.0, 3).reshape(1, 2, 1, 1)
    with pallas.interpreted():
        o = softplus_attention(x, x, x, 1.0, implementation="pallas_tpu")
    a = np.log1p(np.exp(np.log(2) * 2 * np.array([1, 2])))
    np.testing.assert_allclose(o[0, :, 0, 0], [1, (a[0] + 2 * a[1]) / a.sum()], rtol=1e-6)


def test_a_window_bounds_the_blocks_that_are_visited():
    """Every alignment of a window against blocks; the bound is met."""
    for block, other, window in ((8, 4, 1), (8, 8, 5), (16, 8, 9), (8, 16, 24)):
        spans = [
            (last // block) - (first // block) + 1
            for first in range(block)
            for last in [first + other + window - 2]
        ]
        assert most_blocks(99, block, other, window) == max(spans)
    assert most_blocks(3, 8, 8, None) == 3


def test_what_is_refused_says_why():
    x = jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float32)

    def run(x, **options):
        return softplus_attention(x, x, x, mask=Mask(), implementation="pallas_tpu", **options)

    with pytest.raises(ValueError, match="it is compiled for tpu and this is cpu"):
        jax.eval_shape(run, x)
    with pallas.compiling_for("tpu"):
        with pytest.raises(ValueError, match="q=8, k=8 must be multiples of 128 and 16"):
            jax.eval_shape(lambda x: run(x, block_sizes=BlockSizes(8, 8)), x)
        with pytest.raises(ValueError, match="D=2048, Dv=2048 pass 1024"):
            jax.eval_shape(run, jax.ShapeDtypeStruct((1, 4, 1, 2048), jnp.float32))
