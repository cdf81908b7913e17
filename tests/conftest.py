"""Test environment: eight fake CPU devices and no accelerator, set before JAX is imported anywhere.

Programs here run once on small arrays, so compiling them is the cost: the compiler's optimiser is off, which makes the
suite two to three times faster. The arithmetic is the same; subprocesses of tests inherit these flags.
"""

import os

FLAGS = {
    "xla_force_host_platform_device_count": "8",
    "xla_backend_optimization_level": "0",
}

os.environ["JAX_PLATFORMS"] = "cpu"
given = os.environ.get("XLA_FLAGS", "").split()
missing = [f"--{name}={value}" for name, value in FLAGS.items() if not any(name in flag for flag in given)]
os.environ["XLA_FLAGS"] = " ".join(given + missing)
