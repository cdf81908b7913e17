"""Tropical attention, reference: the shared contract."""

from tests.kernels.tropical.contracts import ATTENTION_CASES, AttentionContract


class TestReference(AttentionContract):
    implementation = "reference"
    cases = {name: ATTENTION_CASES[name] for name in ("one", "segments", "smooth")}
