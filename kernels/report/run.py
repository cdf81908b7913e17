"""Compiles the cases for the targets, one after another, and records what comes out; a failure is a row too."""

import contextlib
import importlib.metadata
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from kernels.report import gpu, targets, tpu
from kernels.report.case import KernelCase

FULLY = ("v5e", "sm_90")  # machines that get every shape; the others get `few` of them


def measure(
    cases: Sequence[KernelCase], target_names: Sequence[str], folder: Path, known: Sequence[dict] = ()
) -> Iterator[dict]:
    """One record a case and target; `folder` is where the compiler writes its dumps, emptied before each compile.

    First what every target gets, then the other shapes. Records among `known` are given again instead of made anew.
    """
    known = {_key(record): record for record in known if "error" not in record}
    first = [(target, case) for target in target_names for case in few(cases)]
    rest = [(target, case) for target in target_names if target in FULLY for case in cases]
    for target, case in [*first, *(pair for pair in rest if pair not in first)]:
        platform = targets.platform(target)
        if platform in case.platforms:
            start = _start(case, target)
            yield known.get(_key(start)) or _record(start, case, target, platform, folder)


def few(cases: Sequence[KernelCase]) -> list[KernelCase]:
    """Of each kernel the first case in bfloat16 and the first in float32, quick ones only if there are no others."""
    chosen = {}
    for case in sorted(cases, key=lambda case: case.quick):
        narrow = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(case.operands))
        chosen.setdefault((case.kernel, narrow), case)
    return [case for case in cases if any(case is each for each in chosen.values())]


def _start(case, target):
    record = {"kernel": case.kernel, "label": case.label, "target": target, "backward": case.backward}
    return record | ({"facts": dict(case.facts)} if case.facts else {})


def _key(record):
    return tuple(record[name] for name in ("kernel", "label", "target", "backward"))


def _record(record, case, target, platform, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    try:
        function, operands = case.program(platform)
        compiled = targets.compile_for(target, function, *operands)
    except Exception as error:  # whatever the compilers raise is the result
        return record | {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    memory = compiled.memory_analysis()
    record |= {"seconds_to_compile": round(time.monotonic() - started, 2)}
    record |= {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    record |= _costs(compiled)
    found = tpu.kernels(compiled, folder) if platform == "tpu" else gpu.kernels(folder, target)
    return record | {"kernels": found}


def _costs(compiled):
    """The compiler's own estimates, where it gives them."""
    costs = compiled.cost_analysis() or {}
    names = {"flops": "flops", "bytes accessed": "bytes", "optimal_seconds": "optimal_seconds"}
    return {name: costs[key] for key, name in names.items() if key in costs}


def sentence(record: dict) -> str:
    """A record in one line."""
    what = f"{record['target']:6} {record['kernel']} {record['label']}"
    return f"{what}: {record['error']}" if "error" in record else f"{what}: {record['seconds_to_compile']} s"


def versions() -> dict[str, str]:
    """What made the figures: JAX and whichever compilers are installed."""
    names = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
