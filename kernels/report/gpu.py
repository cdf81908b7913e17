"""What Triton and ptxas say of the Pallas kernels in a compiled program: registers, spills, memory, tensor cores.

XLA writes each kernel's PTX and its list of launches into a folder if asked before it starts
(kernels/report/environment.py); ptxas, from the same toolchain, then gives the figures of the machine code.
"""

import re
import subprocess
from pathlib import Path

_ENTRY = re.compile(r"\.entry (\w+)\(")
_LAUNCH = re.compile(r"kCustomKernel.*?(\w+) grid: \[([\d, ]+)\] threads: \[(\d+).*shared_memory: (\d+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_BY_XLA = re.compile(r"(loop|input|wrapped|gemm)_")  # what XLA made of the code around the kernels
_TENSOR_CORES = re.compile(r"wgmma\.mma_async|mma\.sync")


def kernels(folder: Path, target: str) -> list[dict]:
    """One row a kernel: name, registers a thread, spills (bytes), shared (bytes), threads, tensor_cores (yes or no)."""
    launches = {
        m.group(1): m
        for file in folder.glob("*thunk_sequence.txt")
        for m in _LAUNCH.finditer(file.read_text())
    }
    launches = {name: launch for name, launch in launches.items() if not _BY_XLA.match(name)}
    texts = {}
    for file in sorted(folder.glob("*.ptx")):
        text = file.read_text()
        texts |= {name: (file, text) for name in _ENTRY.findall(text)}
    return [_row(name, launches[name], *texts[name], target) for name in launches]


def _row(name, launch, file, text, target):
    said = _assemble(file, target)
    of_kernel = said[said.index(f"'{name}'") :]
    _, stores, loads = (int(n) for n in _SPILLS.search(of_kernel).groups())
    body = text[text.index(f".entry {name}(") :]
    body = body[: body.find("\n}")]
    return {
        "name": name,
        "registers": int(_REGISTERS.search(of_kernel).group(1)),
        "spills": stores + loads,
        "shared": int(launch.group(4)),
        "threads": int(launch.group(3)),
        "tensor_cores": bool(_TENSOR_CORES.search(body)),
    }


def _assemble(file, target):
    architecture = {"sm_90": "sm_90a"}.get(target, target)  # the "a" unlocks Hopper's own matrix instructions
    command = ["ptxas", "-v", f"-arch={architecture}", str(file), "-o", "/dev/null"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr
