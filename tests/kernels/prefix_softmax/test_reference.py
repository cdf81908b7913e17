"""The dense reference: the contract, on the cases that differ in kind."""

from tests.kernels.prefix_softmax.contract import CASES, PrefixContract


class TestReference(PrefixContract):
    implementation = "reference"
    cases = {name: CASES[name] for name in ("seven", "continued", "segments", "pooled")}
