"""What every implementation of slot attention must satisfy: the contract of all operations on the cases below.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D and Dv head sizes, M slots.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from kernels.slots import ChunkSizes, SlotState, slot_attention
from tests.kernels.contract import Case, OpContract, packed

__all__ = ["Case", "SlotCase", "SlotContract", "draw", "packed"]


@dataclass(frozen=True)
class SlotCase(Case):
    M: int = 3
    state: bool = False  # with an initial state
    rotated: bool = True  # with queries and keys of the window's own

    __hash__ = object.__hash__


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def draw(case: SlotCase, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Float64 operands: q, k, v, log_gates, and as the case says q_window, k_window, state_key, state_value."""
    B, T, S, H, K, M = case.B, case.T, case.S, case.H, case.K, case.M
    shapes = {
        "q": (B, T, H, case.D),
        "k": (B, S, K, case.D),
        "v": (B, S, K, case.Dv),
        "log_gates": (B, S, K, M),
    }
    if case.rotated:
        shapes |= {"q_window": (B, T, H, case.D), "k_window": (B, S, K, case.D)}
    if case.state:
        shapes |= {"state_key": (B, K, M, case.D), "state_value": (B, K, M, case.Dv)}
    operands = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return operands | {"log_gates": log_sigmoid(1 + 2 * operands["log_gates"])}


class SlotContract(OpContract):
    query_operands = ("q",)
    key_operands = ("k", "v", "log_gates")
    cases = {
        "one": SlotCase(1, 1, options={"window": 2}),
        "seven": SlotCase(7, 7, H=3, K=3, rotated=False, options={"window": 64, "slot_shift": 3, "scale": 0.7}),
        "slots_only": SlotCase(111, 111, D=13, rotated=False, state=True, options={"window": 0}),
        "segments": SlotCase(63, 63, H=6, K=2, D=7, Dv=11, M=5, state=True, mask=packed(63, 63),
                             options={"window": 5, "document_state": "initial", "empty_slots": "mask",
                                      "chunk_sizes": ChunkSizes(24, 8)}),
        "empty_rows": SlotCase(19, 45, B=3, mask={"q_offset": 26, "starts": np.array([7, 33, 45], np.int32)},
                               options={"window": 9, "empty_slots": "mask"}),
        "traced_chunk": SlotCase(7, 63, H=4, mask={"q_offset": np.int32(29), "lengths": np.array([31, 63], np.int32)},
                                 options={"window": 8, "slot_shift": 2}),
    }  # fmt: skip

    def operands(self, case, rng):
        return draw(case, rng)

    def call(self, case, implementation, operands):
        operands = dict(operands)
        wide = jnp.promote_types(jnp.float32, operands["q"].dtype)
        operands["log_gates"] = operands["log_gates"].astype(wide)  # gates are never narrower
        state = None
        if case.state:
            state = SlotState(operands.pop("state_key"), operands.pop("state_value"))
        o, state, lse, (lse_slots, lse_window) = slot_attention(
            **operands, mask=self.mask(case), initial_state=state, implementation=implementation,
            return_state=True, return_lse=True, return_branch_lse=True, **case.options,
        )  # fmt: skip
        return {"o": o, "key": state.key, "value": state.value, "written": state.written, "lse": lse,
                "lse_slots": lse_slots, "lse_window": lse_window}  # fmt: skip
