"""Compiler flags of the tests; import this before JAX.

Programs here run once on small arrays, so compiling them is the cost: the CPU compiler's optimiser is off, which makes
the suite several times faster. The arithmetic is the same; subprocesses of tests inherit these flags.
"""

import os
from importlib.metadata import version

FLAGS = {"xla_backend_optimization_level": "0"}
if version("jaxlib").startswith("0.10."):
    FLAGS["xla_cpu_use_fusion_emitters"] = "false"  # later versions have no other way and refuse the flag


def set_flags(**more: str) -> None:
    """CPU only, with FLAGS and `more` in XLA_FLAGS unless they are set already."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault(
        "KERNELS_FOR", ""
    )  # kernels of accelerators are asked for by name; see kernels/dispatch.py
    given = os.environ.get("XLA_FLAGS", "").split()
    flags = FLAGS | more
    missing = [
        f"--{name}={value}" for name, value in flags.items() if not any(name in flag for flag in given)
    ]
    os.environ["XLA_FLAGS"] = " ".join(given + missing)
