"""Test environment: eight fake CPU devices and no accelerator, set before JAX is imported anywhere."""

from tests.flags import set_flags

set_flags(xla_force_host_platform_device_count="8")
