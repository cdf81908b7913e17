"""What every implementation of prefix softmax must satisfy. Letters: B batch, S positions, H and K heads, Dv size."""

import numpy as np

from kernels.prefix_softmax import PrefixState, prefix_softmax
from tests.kernels.contract import Case, OpContract, packed


def square(S: int, **rest) -> Case:
    return Case(S, S, **rest)


INTERRUPTED = dict.fromkeys(
    ("q_segments", "kv_segments"), np.array([[3] * 4 + [0] * 2 + [3] * 5 + [1] * 8, [0] * 19], np.int32)
)
CASES = {
    "one": square(1, Dv=5),
    "seven": square(7, H=3, K=1, Dv=1),
    "sixty_three": square(63, H=6, K=3, Dv=11, options={"chunk_size": 16}),
    "default_chunk": square(111, H=5, K=5, Dv=13),
    "continued": square(29, H=4, K=2, Dv=7, options={"chunk_size": 8, "initial": True}),
    # chunks of 7: a document begins with a chunk (21) and within one (31)
    "segments": square(63, H=4, K=2, B=3, mask=packed(63, 63, B=3), options={"chunk_size": 7}),
    "padding_inside": square(19, mask=INTERRUPTED, options={"chunk_size": 4}),
    "left_padding": square(45, B=3, mask={"starts": np.array([7, 33, 45], np.int32)}, options={"chunk_size": 8}),
    "lengths": square(31, mask={"lengths": np.array([5, 31], np.int32)}, options={"chunk_size": 16}),
    "pooled": square(31, H=6, K=2, mask={"causal": False, "lengths": np.array([31, 19], np.int32)}),
    "pooled_segments": square(23, B=3, mask={"causal": False, **packed(23, 23, B=3)}),
}  # fmt: skip


class PrefixContract(OpContract):
    cases = CASES
    query_operands, key_operands = (), ("s", "v")

    def operands(self, case, rng):
        """Logits of a wide range; with the option `initial` also a state to continue."""
        s = rng.normal(0, 3, size=(case.B, case.S, case.H))
        drawn = {"s": s, "v": rng.normal(size=(case.B, case.S, case.K, case.Dv))}
        if case.options.get("initial"):
            m, z = rng.normal(size=(case.B, case.H)), 1 + rng.random(size=(case.B, case.H))
            m[0, 0], z[0, 0] = -np.inf, 0  # a head that has seen nothing
            drawn |= {"m": m, "z": z, "n": rng.normal(size=(case.B, case.H, case.Dv)) * (z > 0)[..., None]}
        return drawn

    def call(self, case, implementation, operands):
        state = PrefixState(*(operands[n] for n in "mzn")) if case.options.get("initial") else None
        causal = case.mask.get("causal", True)
        results = prefix_softmax(
            operands["s"], operands["v"], mask=self.mask(case), initial_state=state, return_lse=True,
            return_state=causal, chunk_size=case.options.get("chunk_size"), implementation=implementation,
        )  # fmt: skip
        outputs = {"o": results[0], "lse": results[1]}
        return outputs | ({f"state_{n}": x for n, x in results[2]._asdict().items()} if causal else {})
