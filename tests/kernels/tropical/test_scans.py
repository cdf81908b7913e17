"""The max-plus scan and max-plus linear attention, every implementation: the shared contract."""

from tests.kernels.tropical.contracts import LINEAR_CASES, SCAN_CASES, LinearContract, ScanContract


class TestLinearBlockwise(LinearContract):
    implementation = "blockwise"


class TestLinearReference(LinearContract):
    implementation = "reference"
    cases = {name: LINEAR_CASES[name] for name in ("one", "left_padding")}


class TestScanBlockwise(ScanContract):
    implementation = "blockwise"


class TestScanAssociative(ScanContract):
    implementation = "associative"
    cases = {name: SCAN_CASES[name] for name in ("one", "segments")}


class TestScanReference(ScanContract):
    implementation = "reference"
    cases = {name: SCAN_CASES[name] for name in ("one", "segments")}
