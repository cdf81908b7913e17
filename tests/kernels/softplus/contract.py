"""The cases of softplus attention, and how its implementations are called; see tests/kernels/contract.py."""

import jax
import numpy as np
import pytest

from kernels import pallas
from kernels.softplus import BlockSizes, softplus_attention
from tests.kernels.contract import Case, OpContract, packed

SMALL = BlockSizes(16, 8)
P15, P3 = {"power": 15.0}, {"power": 3}
STAGE_1_KEPT = {"degenerate": "lssa", "degenerate_tolerance": 0.7}

CASES = {
    "seven": Case(7, 7, H=3, K=3,
                  options=P3 | {"phi": "exp", "slopes": np.array([0.5, 0.25, 0.1]), "normalise": "none"}),
    "sixty_three": Case(63, 63, H=6, K=2, D=7, Dv=11, options=P15 | {"block_sizes": SMALL}),
    "default_blocks": Case(111, 111, D=13),
    "traced_chunk": Case(7, 63, mask={"q_offset": np.int32(29)},
                         options=P3 | STAGE_1_KEPT | {"block_sizes": BlockSizes(3, 8)}),
    "decode": Case(1, 63, H=3, K=1, mask={"q_offset": np.int32(40), "lengths": np.array([41, 13], np.int32)},
                   options=P3),
    "window": Case(19, 111, mask={"q_offset": 92, "window": 37}, options=P15 | {"block_sizes": BlockSizes(8, 16)}),
    "segments": Case(63, 63, H=4, K=2, mask=packed(63, 63), options=P15 | {"block_sizes": SMALL}),
    "segment_chunk": Case(17, 63, mask={"q_offset": 40, **packed(17, 63, 40)},
                          options={"phi": "sigmoid", "normalise": "none", "log_bias": True, "log_count": False}),
    "empty_rows": Case(19, 45, B=3, mask={"q_offset": 26, "starts": np.array([7, 33, 45], np.int32)}, options=P15),
    "all_keys": Case(7, 31, H=5, K=1, mask={"causal": False, "lengths": np.array([31, 0], np.int32)},
                     options={"phi": "exp"}),
    "learned": Case(31, 31, H=3, K=3, options={"learned": True, "block_sizes": SMALL}),
    "sharp_softmax": Case(31, 31, mask=packed(31, 31), options={"phi": "exp", "power": 2.5, "block_sizes": SMALL}),
    "relu_squared": Case(31, 31, K=1,
                         options={"phi": "relu", "phi_power": 2, "normalise": "1/n", "power": 1, "offset": 0.1}),
}  # fmt: skip


class SoftplusContract(OpContract):
    """Subclasses set `implementation`."""

    cases = CASES
    gradient_tolerance = 3e-4  # p = 15 multiplies rounding by 15

    def operands(self, case, rng):
        drawn = super().operands(case, rng)
        unit = {
            name: x / np.linalg.norm(x, axis=-1, keepdims=True) for name, x in drawn.items() if name != "v"
        }
        drawn |= unit | {"gain": 0.7 + rng.random(case.H)}
        return drawn | ({"power": 2 + 9 * rng.random(case.H)} if "learned" in case.options else {})

    def call(self, case, implementation, operands):
        options = {name: x for name, x in case.options.items() if name != "learned"}
        o = softplus_attention(**operands, mask=self.mask(case), implementation=implementation, **options)
        return {"o": o}


class SimulatedContract(SoftplusContract):
    """A Pallas kernel, simulated; what takes long is thorough, and float64 is refused."""

    test_in_float64_they_match_to_its_rounding = None

    @pytest.fixture(autouse=True)
    def _simulated(self):
        with pallas.interpreted():
            yield

    def test_float64_is_refused(self):
        case = min(self.cases.values(), key=lambda case: case.T)
        with jax.enable_x64(True), pytest.raises(ValueError, match="q is float64; cast q, k, v to float32"):
            self.call(case, self.implementation, self.draw(case))

    @pytest.mark.thorough
    def test_compiled_mapped_rematerialised_and_exported_are_the_same(self):
        super().test_compiled_mapped_rematerialised_and_exported_are_the_same()
