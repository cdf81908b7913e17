"""The dense reference: the contract, on the cases that differ in kind."""

from tests.kernels.log_prob.contract import LogProbContract, head


class TestReference(LogProbContract):
    implementation = "reference"
    cases = {
        "default": head(7, 61),
        "all": head(13, 29, vocab_axis=0, absent=True, temperature=0.7, soft_cap=20.0),
    }
