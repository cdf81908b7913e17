"""The TPU kernels, simulated: the contract, with several blocks of rows and vocabulary, and a search for races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas
from kernels.log_prob import BlockSizes, token_log_probs
from kernels.log_prob.tpu import SIZES, vmem
from tests.kernels.log_prob.contract import LogProbContract, head

BLOCKS = (128, 128)
QUICK = {"small": head(5, 23, B=1, absent=True)}
# 262 or 266 rows in three blocks; the vocabulary ends within a block, and at the end of one
MORE = {
    "blocks": head(133, 300, BLOCKS, D=7, absent=True),
    "embedding": head(131, 256, BLOCKS, D=3, vocab_axis=0, temperature=0.7, soft_cap=20.0),
    "no_entropy": head(131, 300, BLOCKS, return_entropy=False, vocab_axis=0),
    "only_entropy": head(63, 385, BLOCKS, return_argmax=False, temperature=2.5),
}


class Simulated(LogProbContract):
    implementation = "pallas_tpu"
    test_in_float64_they_match_to_its_rounding = None  # refused, see below

    def call(self, case, implementation, operands):
        with pallas.interpreted():
            return super().call(case, implementation, operands)


class TestQuick(Simulated):
    cases = QUICK
    test_compiled_mapped_rematerialised_and_exported_are_the_same = None  # thorough
    test_bfloat16 = None  # thorough


@pytest.mark.thorough
class TestThorough(Simulated):
    cases = MORE


@pytest.mark.smoke
def test_several_blocks():
    contract, case = Simulated(), head(70, 150, BLOCKS, D=3, absent=True)
    x = contract.draw(case, np.float32)
    got, want = contract.evaluate(case, "pallas_tpu", x), contract.evaluate(case, "reference", x)
    contract.compare(got, want, 2e-5, 2e-5, "blocks")


@pytest.mark.thorough
def test_no_races_and_nothing_read_that_was_not_written():
    how = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    case = head(65, 150, BLOCKS, D=3, absent=True, soft_cap=5.0)
    contract = LogProbContract()
    x = contract.draw(case, np.float32)
    want = contract.evaluate(case, "reference", x)
    with pallas.interpreted(how):
        got = contract.evaluate(case, "pallas_tpu", x)
    contract.compare(got, want, 2e-5, 2e-5, "searched")
    assert not pltpu_races()


def pltpu_races() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("dtype", "D", "sizes", "message"),
    [
        (jnp.float16, 8, None, "it multiplies bfloat16 and float32, and hidden is float16"),
        (jnp.bfloat16, 8, BlockSizes(64, 128), "rows=64, vocab=128 must be multiples of 128"),
        (
            jnp.bfloat16,
            2**15,
            None,
            "blocks of 128 rows and 128 tokens with D=32768 in bfloat16 take .* MiB of VMEM",
        ),
    ],
)
def test_what_it_refuses(dtype, D, sizes, message):
    h, w, labels = jnp.zeros((2, D), dtype), jnp.zeros((D, 4), dtype), jnp.zeros(2, jnp.int32)
    with pallas.interpreted(), pytest.raises(ValueError, match=message):
        token_log_probs(h, w, labels, implementation="pallas_tpu", block_sizes=sizes)


def test_float64_is_refused():
    with jax.enable_x64(True), pallas.interpreted(), pytest.raises(ValueError, match="and hidden is float64"):
        token_log_probs(jnp.zeros((2, 3)), jnp.zeros((3, 4)), jnp.zeros(2, int), implementation="pallas_tpu")


def test_usual_sizes_fit_the_default_vmem():
    """So that the compiler is asked for more only where hidden states are long."""
    assert vmem(*SIZES[1], 1024, jnp.bfloat16) <= 14 * 2**20
    assert vmem(*SIZES[-1], 8192, jnp.bfloat16) <= 36 * 2**20
