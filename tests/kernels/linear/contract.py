"""What every implementation of linear attention must satisfy: the shared contract on this operation's cases."""

import jax.numpy as jnp
import numpy as np

from kernels.linear import State, linear_attention
from kernels.masks import Mask
from tests.kernels.contract import Case, OpContract, packed

GIVEN = {"given_state": True}  # a random state comes before the keys
CASES = {
    "one": Case(1, 1, options={"angle": 0.3}),
    "seven": Case(7, 7, H=3, K=3, options={"angle": 0.0, "chunk_size": 3, **GIVEN}),
    "sixty_three": Case(63, 63, H=6, K=2, D=7, Dv=11, mask=packed(63, 63), options={"angle": 0.02, "chunk_size": 11}),
    "default_chunks": Case(111, 111, H=3, K=1, D=13, options={"angle": np.array([[0.014], [0.008]])}),
    "per_channel": Case(31, 31, options={"learned_angle": True, "chunk_size": 8, **GIVEN}),
    "packed_state": Case(19, 19, K=1, mask=packed(19, 19), options={"angle": 0.1, "chunk_size": 4, **GIVEN}),
    "padding": Case(19, 19, B=3, mask={"starts": np.array([0, 7, 19]), "lengths": np.array([19, 11, 4])},
                    options={"angle": 0.08, "chunk_size": 8}),
    "later_chunk": Case(7, 63, mask={"q_offset": np.int32(29)}, options={"angle": 0.02, "chunk_size": 9, **GIVEN}),
    "packed_chunk": Case(17, 63, H=3, K=1, mask={"q_offset": 40, **packed(17, 63, 40)}, options={"angle": 0.02}),
    "all_keys": Case(7, 31, H=6, K=3, mask={"causal": False, "lengths": np.array([31, 19])},
                     options={"angle": 0.04, **GIVEN}),
    "all_keys_packed": Case(13, 23, K=1, mask={"causal": False, **packed(13, 23, 5)},
                            options={"learned_angle": True, "chunk_size": 6}),
}  # fmt: skip


class Contract(OpContract):
    """Numerators, denominators and states, as they are: the division is the caller's."""

    cases = CASES
    output = "num"
    zero_without_keys = False  # where a state is given, it is seen; see test_linear.py

    def operands(self, case, rng):
        operands = super().operands(case, rng)
        if case.options.get("learned_angle"):
            operands["angle"] = rng.uniform(0.0, 0.4, size=case.D)
        if case.options.get("given_state"):
            shape = (case.B, case.K, case.D, case.Dv + 1)
            operands["real"] = rng.normal(size=shape)
            if case.options.get("angle") != 0.0:
                operands["imag"] = rng.normal(size=shape)
        return operands

    def call(self, case, implementation, operands):
        options = {n: x for n, x in case.options.items() if n not in ("learned_angle", "given_state")}
        options |= {"angle": operands["angle"]} if "angle" in operands else {}
        wide = jnp.promote_types(jnp.float32, operands["q"].dtype)
        if "real" in operands:
            state = State(*(operands[n].astype(wide) for n in ("real", "imag") if n in operands))
            options["initial_state"] = state
        num, den, state = linear_attention(
            operands["q"], operands["k"], operands["v"], mask=self.mask(case), return_state=True,
            implementation=implementation, **options,
        )  # fmt: skip
        assert num.dtype == den.dtype == state.real.dtype == wide
        states = {"real": state.real} | ({} if state.imag is None else {"imag": state.imag})
        return {"num": num.astype(operands["v"].dtype), "den": den, **states}

    def mask(self, case) -> Mask:
        """Segments of queries and keys are one array where they are equal."""
        mask = super().mask(case)
        if case.T == case.S and "q_segments" in case.mask:
            object.__setattr__(mask, "q_segments", mask.kv_segments)
        return mask
