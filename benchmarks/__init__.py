"""Timings, never part of the tests: ratios of forms measured side by side in one run."""
