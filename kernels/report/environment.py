"""The environment variables that the compilers read once, when they are loaded.

Imports no JAX, and has to be called before anything else does.

The dump flags are undocumented: a developer's instrument, which a new compiler may take away.
"""

import os
from collections.abc import Sequence
from pathlib import Path

TPU_TARGETS = ("v5e", "v5p", "v6e", "tpu7x")
GPU_TARGETS = ("sm_80", "sm_90")

_TPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_TPU_FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
_GPU = {"JAX_PLATFORMS": "cpu"}
_GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_dump_to={folder}"


def prepare(targets: Sequence[str], folder: Path) -> None:
    """Sets what the compiler of `targets` needs; it will write its dumps into `folder`.

    Raises ValueError for an unknown target, or for TPU and GPU targets in one process.
    """
    unknown = [name for name in targets if name not in TPU_TARGETS + GPU_TARGETS]
    if unknown or not targets:
        raise ValueError(f"targets {unknown} are unknown; known: {', '.join(TPU_TARGETS + GPU_TARGETS)}")
    on_tpu = [name in TPU_TARGETS for name in targets]
    if any(on_tpu) and not all(on_tpu):
        raise ValueError(
            f"targets {', '.join(targets)} want different environments: TPU and GPU in separate runs"
        )
    os.environ.update(_TPU if on_tpu[0] else _GPU)
    variable, flags = ("LIBTPU_INIT_ARGS", _TPU_FLAGS) if on_tpu[0] else ("XLA_FLAGS", _GPU_FLAGS)
    os.environ[variable] = f"{os.environ.get(variable, '')} {flags.format(folder=folder)}".strip()
