"""What every implementation of linear attention must satisfy: the shared contract on this operation's cases."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels import masks
from kernels.linear import State, linear_attention
from kernels.masks import Mask
from tests.kernels.contract import Case, OpContract, packed

GIVEN = {"given_state": True}  # a random state comes before the keys
NUMERATOR = {"denominator": False}
DECAYS = {"number": ("log_key_decay",), "key": ("log_key_decay",), "value": ("log_value_decay",),
          "key value": ("log_key_decay", "log_value_decay")}  # fmt: skip
OF_THE_TEST = ("learned_angle", "given_state", "decay")  # options that say which operands to draw
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
    "no_denominator": Case(13, 13, K=1, options={"angle": 0.1, "chunk_size": 4, **GIVEN, **NUMERATOR}),
    "decay": Case(63, 63, H=6, K=2, D=7, Dv=11, mask=packed(63, 63),
                  options={"decay": "number", "chunk_size": 16, **GIVEN}),
    "decay_angle": Case(31, 31, options={"decay": "number", "angle": 0.1, "chunk_size": 8, **GIVEN}),
    "key_decay": Case(63, 63, H=6, K=2, D=7, Dv=11, mask=packed(63, 63),
                      options={"decay": "key", "chunk_size": 17, **GIVEN}),
    "key_decay_angles": Case(19, 19, K=1, options={"decay": "key", "learned_angle": True, "chunk_size": 8, **GIVEN}),
    "value_decay": Case(47, 47, H=3, K=1, mask=packed(47, 47),
                        options={"decay": "value", "chunk_size": 16, **GIVEN, **NUMERATOR}),
    "both_decays": Case(19, 19, B=3, mask={"starts": np.array([0, 7, 19]), "lengths": np.array([19, 11, 4])},
                        options={"decay": "key value", "chunk_size": 8, **GIVEN, **NUMERATOR}),
    "decay_later": Case(7, 23, mask={"q_offset": np.int32(19)}, options={"decay": "number", "angle": 0.1, **GIVEN}),
    "decay_earlier": Case(7, 23, K=1, mask={"q_offset": -3}, options={"decay": "key", "chunk_size": 8, **GIVEN}),
    "decay_packed_chunk": Case(17, 31, mask={"q_offset": 10, **packed(17, 31, 10)},
                               options={"decay": "value", **GIVEN, **NUMERATOR}),
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
        for name in DECAYS.get(case.options.get("decay"), ()):
            shape = operands["v" if name == "log_value_decay" else "k"].shape
            shape = shape[:3] if case.options["decay"] == "number" else shape
            slow = np.exp(rng.uniform(-7, -0.5, size=shape))  # something is left after several chunks
            operands[name] = -np.where(rng.random(shape) < 0.02, 30.0, slow)
        if case.options.get("given_state"):
            shape = (case.B, case.K, case.D, case.Dv + case.options.get("denominator", True))
            operands["real"] = rng.normal(size=shape)
            if case.options.get("angle") or case.options.get("learned_angle"):
                operands["imag"] = rng.normal(size=shape)
        return operands

    def call(self, case, implementation, operands):
        options = {n: x for n, x in case.options.items() if n not in OF_THE_TEST}
        options |= {"angle": operands["angle"]} if "angle" in operands else {}
        wide = jnp.promote_types(jnp.float32, operands["q"].dtype)
        options |= {n: operands[n].astype(wide) for n in DECAYS.get(case.options.get("decay"), ())}
        if "real" in operands:
            state = State(*(operands[n].astype(wide) for n in ("real", "imag") if n in operands))
            options["initial_state"] = state
        num, den, state = linear_attention(
            operands["q"], operands["k"], operands["v"], mask=self.mask(case), return_state=True,
            implementation=implementation, **options,
        )  # fmt: skip
        assert num.dtype == state.real.dtype == wide
        den = {} if den is None else {"den": den}
        states = {"real": state.real} | ({} if state.imag is None else {"imag": state.imag})
        return {"num": num.astype(operands["v"].dtype), **den, **states}

    def test_decays_are_read_by_exact_zeros(self, name):
        """A row's decays are those of its own document between the oldest key it sees, or the state, and itself."""
        case = self.cases[name]
        operands = self.draw(case, np.float32)
        decays = {n: operands[n] for n in DECAYS.get(case.options.get("decay"), ())}
        seen = np.broadcast_to(masks.dense(self.mask(case), case.T, case.S), (case.B, case.T, case.S))
        row = case.T // 2
        older = np.cumsum(seen[:, row], axis=1) > 1  # not the first visible key
        if case.options.get("given_state"):
            older |= _reads_the_state(case, row)[:, None]

        def one_row(decays):
            num = self.call(case, self.implementation, operands | decays)["num"]
            return jnp.sum(num[:, row] * jnp.cos(jnp.arange(num[:, row].size).reshape(num[:, row].shape)))

        gradients = jax.jit(jax.grad(one_row))(decays) if decays else {}
        for each, gradient in gradients.items():
            moved = np.abs(np.asarray(gradient)).reshape(case.B, case.S, -1).max(-1) > 0
            assert moved.any() or not np.any(seen[:, row] & older), each
            assert not np.any(moved & ~(seen[:, row] & older)), each

    def mask(self, case) -> Mask:
        """Segments of queries and keys are one array where they are equal."""
        mask = super().mask(case)
        if case.T == case.S and "q_segments" in case.mask:
            object.__setattr__(mask, "q_segments", mask.kv_segments)
        return mask


def _reads_the_state(case, row):
    """bool [B]: the state belongs to the first document that is no padding."""
    if "q_segments" not in case.mask:
        return np.ones(case.B, bool)
    keys = case.mask["kv_segments"]
    first = np.take_along_axis(keys, (keys != 0).argmax(1)[:, None], axis=1)[:, 0]
    return case.mask["q_segments"][:, row] == first
