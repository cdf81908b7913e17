"""Tropical attention, blockwise: the shared contract."""

from tests.kernels.tropical.contracts import AttentionContract


class TestBlockwise(AttentionContract):
    implementation = "blockwise"
