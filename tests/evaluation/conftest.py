"""Compile these tests' many tiny programs quickly rather than well."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
