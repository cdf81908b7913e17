"""Fixtures of the trainer's tests."""

from tests.training.runs import text_folder  # noqa: F401  (a fixture)
