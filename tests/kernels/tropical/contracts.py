"""The shared contract, fitted to the operations of the max-plus semiring. Letters: see `tests/kernels/contract.py`."""

import numpy as np

from kernels.tropical import BlockSizes, devalue, maxplus_linear_attention, maxplus_scan, tropical_attention
from tests.kernels.contract import Case, OpContract, packed

SMALL = BlockSizes(16, 8)
starts = lambda *n: {"starts": np.array(n, np.int32)}  # noqa: E731

ATTENTION_CASES = {
    "one": Case(1, 1, mask={"causal": False}),
    "seven": Case(7, 7, H=3, K=3, D=7, options={"score": "hilbert_asym", "score_scale": 0.5}),
    "grouped": Case(63, 63, H=6, K=2, D=11, Dv=7, options={"block_sizes": SMALL, "slopes": True, "bias": "full"}),
    "default_blocks": Case(111, 111, H=1, K=1, D=13, mask={"window": 37}),
    "all_keys": Case(7, 31, H=5, K=1, mask={"causal": False, "lengths": np.array([31, 19], np.int32)},
                     options={"score": "maxplus_dot", "bias": "keys"}),
    "segments": Case(63, 63, H=2, K=2, mask=packed(63, 63), options={"block_sizes": SMALL}),
    "empty_rows": Case(19, 45, B=3, mask={"q_offset": 26, **starts(7, 33, 45)}),
    "smooth": Case(37, 41, H=2, K=1, mask={"q_offset": 4, **starts(3, 41)},
                   options={"smooth_beta": 2.0, "bias": "full"}),
    "lse": Case(35, 35, mask=packed(35, 35), options={"score": "lse_dot"}),
}  # fmt: skip


class AttentionContract(OpContract):
    cases = ATTENTION_CASES

    def operands(self, case, rng):
        given = super().operands(case, rng)
        if case.options.get("slopes"):
            given["slopes"] = rng.uniform(0.01, 0.3, size=case.H)
        if "bias" in case.options:
            full = case.options["bias"] == "full"
            given["bias"] = rng.normal(
                size=(case.B, case.H, case.T, case.S) if full else (1, case.H, 1, case.S)
            )
        return given

    def call(self, case, implementation, operands):
        options = {name: x for name, x in case.options.items() if name not in ("bias", "slopes")}
        hard = "smooth_beta" not in options and options.get("score") != "lse_dot"
        o, c, *winners = tropical_attention(
            **operands, mask=self.mask(case), return_context=True, return_winners=hard,
            implementation=implementation, **options,
        )  # fmt: skip
        return {"o": o, "context": c} | ({"winners": winners[0]} if hard else {})


LINEAR_CASES = {
    "one": Case(1, 1, options={"decay": True, "state": True}),
    "seven": Case(7, 7, H=3, K=3, D=7),
    "chunks": Case(111, 111, H=6, K=2, D=11, options={"decay": True, "state": True}),
    "segments": Case(63, 63, H=5, K=1, Dv=13, mask=packed(63, 63), options={"decay": True, "state": True}),
    "left_padding": Case(71, 71, B=3, mask=starts(0, 66, 71), options={"decay": True, "state": True}),
}


class LinearContract(OpContract):
    """`query_operands` besides q: none; the decay of a token is read by later rows of its document."""

    cases = LINEAR_CASES
    key_operands = ("k", "v")

    def operands(self, case, rng):
        given = super().operands(case, rng)
        if case.options.get("decay"):
            given["log_decay"] = -rng.uniform(0, 0.3, size=(case.B, case.T, case.K))
        if case.options.get("state"):
            given["initial_state"] = rng.normal(size=(case.B, case.K, case.D, case.Dv))
        return given

    def call(self, case, implementation, operands):
        c, state, winners = maxplus_linear_attention(
            **operands,
            mask=self.mask(case),
            return_state=True,
            return_winners=True,
            implementation=implementation,
        )
        o = devalue(c, "expm1", None).astype(operands["q"].dtype)
        return {"o": o, "context": c, "state": state, "winners": winners}


SCAN_CASES = {
    "one": Case(1, 1, options={"state": True}),
    "seven": Case(7, 7, H=3, D=7),
    "chunks": Case(300, 300, H=1, D=5, options={"state": True}),
    "segments": Case(63, 63, mask=packed(63, 63), options={"state": True}),
    "left_padding": Case(111, 111, B=3, mask=starts(0, 66, 111), options={"state": True}),
}


class ScanContract(OpContract):
    cases = SCAN_CASES
    query_operands = ()
    key_operands = ("a", "b")

    def operands(self, case, rng):
        shape = (case.B, case.T, case.H, case.D)
        given = {"a": -rng.uniform(0, 0.5, size=shape), "b": rng.normal(size=shape)}
        if case.options.get("state"):
            given["h0"] = rng.normal(size=(case.B, case.H, case.D))
        return given

    def call(self, case, implementation, operands):
        h, state = maxplus_scan(
            **operands, mask=self.mask(case), return_state=True, implementation=implementation
        )
        return {"o": devalue(h, "expm1", None).astype(operands["b"].dtype), "h": h, "state": state}
