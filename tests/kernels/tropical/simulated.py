"""What the max-plus kernels must satisfy in a simulation: the contracts in small blocks, and ties to the bit.

Letters: see `tests/kernels/contract.py`; R channels of the scan, M, N, K of the matrix product.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import pallas
from kernels.masks import Mask
from kernels.tropical import (
    BlockSizes,
    maxplus_linear_attention,
    maxplus_matmul,
    maxplus_scan,
    tropical_attention,
)
from tests.kernels.contract import Case, OpContract, packed
from tests.kernels.tropical.contracts import (
    ATTENTION_CASES,
    LINEAR_CASES,
    SCAN_CASES,
    AttentionContract,
    LinearContract,
    ScanContract,
    starts,
)

SMALLEST = {"block_sizes": BlockSizes(8, 8)}
HARD = {n: case for n, case in ATTENTION_CASES.items() if n not in ("smooth", "lse")}
ATTENTION = {
    "grouped": Case(13, 21, H=4, K=2, D=5, Dv=9, mask={"q_offset": 8, "window": 6, **starts(0, 15)},
                    options=SMALLEST | {"slopes": True, "bias": "full"}),
}  # fmt: skip
ATTENTION_THOROUGH = {
    "segments": Case(19, 19, H=2, K=1, D=4, mask=packed(19, 19), options=SMALLEST | {"score": "maxplus_dot"}),
    "lengths": Case(7, 21, H=2, mask={"causal": False, "lengths": np.array([21, 9], np.int32)},
                    options=SMALLEST | {"score": "hilbert_asym", "score_scale": 0.5, "bias": "keys"}),
    **{name: HARD[name] for name in ("one", "seven", "empty_rows")},
    "own_blocks": dataclasses.replace(HARD["default_blocks"], D=3),
}  # fmt: skip
SCAN = {"segments": Case(21, 21, H=1, D=17, mask=packed(21, 21), options={"state": True})}
LINEAR = {
    "segments": Case(19, 19, H=4, K=2, D=5, mask=packed(19, 19), options={"decay": True, "state": True})
}


class Simulated(OpContract):
    """What takes long is thorough, and float64 is refused."""

    test_in_float64_they_match_to_its_rounding = None

    @pytest.fixture(autouse=True)
    def _simulated(self):
        with pallas.interpreted():
            yield

    @pytest.mark.thorough
    def test_float64_is_refused(self):
        case = min(self.cases.values(), key=lambda case: case.T)
        with (
            jax.enable_x64(True),
            pytest.raises(ValueError, match="computes in float32 and an operand is float64"),
        ):
            self.call(case, self.implementation, self.draw(case))

    @pytest.mark.thorough
    def test_compiled_mapped_rematerialised_and_exported_are_the_same(self):
        super().test_compiled_mapped_rematerialised_and_exported_are_the_same()

    @pytest.mark.thorough
    def test_numpy_operands_and_implementation_names(self):
        super().test_numpy_operands_and_implementation_names()

    @pytest.mark.thorough
    def test_rows_read_visible_keys_only_by_exact_zeros(self, name):
        super().test_rows_read_visible_keys_only_by_exact_zeros(name)

    @pytest.mark.thorough
    def test_bfloat16(self):
        super().test_bfloat16()


class SimulatedAttention(Simulated, AttentionContract):
    cases = ATTENTION


class SimulatedScan(Simulated, ScanContract):
    cases = SCAN


class SimulatedLinear(Simulated, LinearContract):
    cases = LINEAR


class ThoroughAttention(SimulatedAttention):
    cases = ATTENTION_THOROUGH


class ThoroughScan(SimulatedScan):
    cases = {name: SCAN_CASES[name] for name in ("one", "seven", "left_padding")}


class ThoroughLinear(SimulatedLinear):
    cases = {
        "left_padding": dataclasses.replace(LINEAR_CASES["left_padding"], T=23, S=23, mask=starts(0, 18, 23)),
        **{name: LINEAR_CASES[name] for name in ("one", "seven")},
    }


def whole_numbers(*shapes, seed=0, low=-2, high=3):
    """Few different whole numbers, so that ties abound and every sum is exact."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(low, high, size=shape), jnp.float32) for shape in shapes]


def _attention(score):
    operands = whole_numbers((2, 13, 4, 4), (2, 21, 2, 4), (2, 21, 2, 9))

    def call(implementation, q, k, v):
        options = {"score": score, "mask": Mask(q_offset=8), "devaluation": "none", **SMALLEST}
        return tropical_attention(q, k, v, return_context=True, return_winners=True, implementation=implementation,
                                  **options)[1:]  # fmt: skip

    return call, operands


def _matmul(a, b):
    a, b = whole_numbers(a, b)

    def call(implementation, a, b):
        return maxplus_matmul(a, b, return_winners=True, implementation=implementation)

    return call, (a.at[..., 0, :].set(-jnp.inf), b)


def _values_only():
    return lambda implementation, a, b: (maxplus_matmul(a, b, implementation=implementation),), whole_numbers(
        (19, 13), (13, 9)
    )


def _scan():
    mask = Mask(starts=jnp.array([0, 10]))

    def call(implementation, a, b, h0):
        return maxplus_scan(a, b, h0, mask=mask, return_state=True, return_carry_wins=True,
                            implementation=implementation)  # fmt: skip

    return call, whole_numbers((2, 21, 2, 9), (2, 21, 2, 9), (2, 2, 9), high=2)


def _linear():
    mask = Mask(**{name: jnp.asarray(x) for name, x in packed(19, 19).items()})

    def call(implementation, q, k, v, a, state):
        return maxplus_linear_attention(q, k, v, a, initial_state=state, mask=mask, return_state=True,
                                        return_winners=True, implementation=implementation)  # fmt: skip

    q, k, v, a, state = whole_numbers((2, 19, 4, 5), (2, 19, 2, 5), (2, 19, 2, 3), (2, 19, 2), (2, 2, 5, 3))
    return call, (q, k, v, -abs(a), state)


TIES = {
    "hilbert": lambda: _attention("hilbert"),
    "product": lambda: _matmul((2, 19, 13), (13, 9)),
    "scan": _scan,
}
TIES_THOROUGH = {
    "linear": _linear,
    "hilbert_asym": lambda: _attention("hilbert_asym"),
    "maxplus_dot": lambda: _attention("maxplus_dot"),
    "product_broadcast": lambda: _matmul((3, 1, 4, 9), (5, 9, 2)),
    "values_only": _values_only,
}


def assert_ties_are_those_of_the_reference(implementation, name, how=True):
    """Values, winners and gradients, all to the bit: whole numbers leave nothing to rounding."""
    call, operands = (TIES | TIES_THOROUGH)[name]()

    def loss(operands, implementation):
        outputs = call(implementation, *operands)
        floats = [jnp.where(jnp.isfinite(x), x, 0) for x in outputs if x.dtype == jnp.float32]
        return sum(jnp.sum(x * (1 + jnp.arange(x.size)).reshape(x.shape)) for x in floats), outputs

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    with pallas.interpreted(how):
        got = run(operands, implementation)
    for found, expected in zip(
        jax.tree.leaves(got), jax.tree.leaves(run(operands, "reference")), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
