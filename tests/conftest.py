"""Test environment: eight fake CPU devices and no accelerator, set before JAX is imported anywhere.

Programs here run once on small arrays, so compiling them is the cost: the CPU compiler's optimiser is off, which makes
the suite several times faster. The arithmetic is the same; subprocesses of tests inherit these flags.
"""

import os
from importlib.metadata import version

FLAGS = {
    "xla_force_host_platform_device_count": "8",
    "xla_backend_optimization_level": "0",
}
if version("jaxlib").startswith("0.10."):
    FLAGS["xla_cpu_use_fusion_emitters"] = "false"  # later versions have no other way and refuse the flag

os.environ["JAX_PLATFORMS"] = "cpu"
given = os.environ.get("XLA_FLAGS", "").split()
missing = [f"--{name}={value}" for name, value in FLAGS.items() if not any(name in flag for flag in given)]
os.environ["XLA_FLAGS"] = " ".join(given + missing)
