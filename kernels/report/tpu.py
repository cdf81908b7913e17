"""What the TPU compiler says of the Pallas kernels in a compiled program: on-chip memory, spills, use of the units.

The compiler writes its final schedule into a folder if asked before it is loaded (kernels/report/environment.py).
"""

import re
from pathlib import Path

import jax

from kernels.report import schedule

_CALL = re.compile(r'%?(\S+) = .*custom_call_target="tpu_custom_call".*')
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


def kernels(compiled: jax.stages.Compiled, folder: Path) -> list[dict]:
    """One row a kernel: name, vmem (bytes), bundles (instructions of the schedule), spills, mxu (share of bundles)."""
    found = [(m.group(1), m.group(0)) for m in map(_CALL.search, compiled.as_text().splitlines()) if m]
    return [{"name": name, "vmem": _vmem(line), **_schedule(folder, name)} for name, line in found]


def _vmem(line):
    size = _VMEM.search(line)
    return int(size.group(1)) if size else 0


def _schedule(folder, name):
    # Equal kernels of a program are compiled once, under the name of one of them.
    known = schedule.kernels(folder)
    same = [name] if name in known else [each for each in known if _plain(each) == _plain(name)]
    found = schedule.stretches(folder, (same or [name])[0])
    bundles = sum(each.bundles for each in found)
    mxu = sum(each.mxu for each in found) / max(bundles, 1)
    return {"bundles": bundles, "spills": schedule.spills(found), "mxu": round(mxu, 3)}


def _plain(name):
    """A name without the number that XLA appends."""
    return re.sub(r"\.\d+$", "", name)
