"""The GPU kernels, simulated: the contract, with several blocks, parts and chunks of the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import pallas
from kernels.log_prob import BlockSizes, gpu, token_log_probs
from tests.kernels.log_prob.contract import LogProbContract, head

BLOCKS = (16, 32)
QUICK = {"small": head(5, 23, B=1, absent=True)}
MORE = {
    "blocks": head(37, 150, BLOCKS, D=37, absent=True),
    "embedding": head(24, 96, BLOCKS, D=64, vocab_axis=0, temperature=0.7, soft_cap=40.0),
    "no_entropy": head(31, 150, BLOCKS, return_entropy=False, vocab_axis=0),
    "only_entropy": head(11, 67, (32, 16), return_argmax=False, temperature=2.5),
}


class Simulated(LogProbContract):
    implementation = "pallas_gpu"
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
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_parts_and_chunks(vocab_axis, monkeypatch):
    """Few programs: each loops over several blocks; small chunks: dh is summed over several, dw is put together."""
    monkeypatch.setattr(gpu, "PROGRAMS", 6)
    monkeypatch.setattr(gpu, "CHUNK", 40 * 64)
    contract, case = Simulated(), head(20, 150, BLOCKS, D=37, absent=True, vocab_axis=vocab_axis)
    x = contract.draw(case, np.float32)
    got, want = contract.evaluate(case, "pallas_gpu", x), contract.evaluate(case, "reference", x)
    contract.compare(got, want, 2e-5, 2e-5, "parts and chunks")


def test_what_it_refuses():
    h, w, labels = jnp.zeros((2, 3)), jnp.zeros((3, 4)), jnp.zeros(2, jnp.int32)
    with pallas.interpreted():
        with pytest.raises(ValueError, match="rows=16, vocab=24 must be powers of two from 16 on"):
            token_log_probs(h, w, labels, implementation="pallas_gpu", block_sizes=BlockSizes(16, 24))
        with jax.enable_x64(True), pytest.raises(ValueError, match="and hidden is float64"):
            token_log_probs(h.astype(float), w.astype(float), labels, implementation="pallas_gpu")
