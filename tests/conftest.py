"""Test environment: eight fake CPU devices and no accelerator, set before JAX is imported anywhere."""

from tests.flags import set_flags

set_flags(xla_force_host_platform_device_count="8")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def no_more_programs_than_a_module_needs():
    """Forget a module's compiled programs: some ten thousand of them exhaust a process's memory maps and crash it."""
    yield
    jax.clear_caches()
