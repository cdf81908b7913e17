"""Several processes, one program: joining a multi-host job and the few things hosts must agree on.

Every host runs the same script. `initialize` finds out how the hosts were started (flags, environment,
Slurm, Cloud TPU, Open MPI or alone) and joins them; afterwards `jax.devices()` are the devices of the whole
job. The helpers below are collective: every process must call them, in the same order.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_GOOGLE_PCI_VENDOR = "0x1ae0"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How this process joins the others: who said so, and the arguments of `jax.distributed.initialize`."""

    source: str
    arguments: Mapping[str, Any]


def initialize(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    platform: str | None = None,
) -> str:
    """Joins the other processes of the job; must come before the first use of a device.

    The first of these that applies decides; the text returned names it ("single process" for the last):
      1. the three arguments; 2. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; 3. Slurm with
      more than one task (JAX gives each task one GPU, so start one task per GPU); 4. a Cloud TPU slice of
      several hosts; 5. Open MPI with more than one rank; 6. nothing: one process, nothing is done.
    `platform` ("cpu", "gpu", "tpu") is what the run was asked to use; "tpu" asks the machine's metadata even
    where no chip can be seen. On CPU, collectives go through gloo. A second call does nothing.

    Raises ValueError if only some of the three values are given, or a launcher left its part out.
    """
    if jax.distributed.is_initialized():
        return "already initialized"
    plan = choose(coordinator, num_processes, process_id, os.environ, platform, tpu=_has_tpu_chips())
    if plan is None:
        return "single process"
    if _is_cpu(platform, os.environ):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**plan.arguments)
    return plan.source


def choose(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environ: Mapping[str, str],
    platform: str | None = None,
    tpu: bool = False,
) -> Plan | None:
    """The decision of `initialize` as a pure function of its arguments, the environment and visible chips."""
    explicit = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if any(value is not None for value in explicit.values()):
        _require_all(explicit, "give all three arguments or none of them")
        return _checked("arguments", coordinator, num_processes, process_id)
    return (
        _from_variables(environ)
        or _from_slurm(environ)
        or _from_cloud_tpu(environ, platform, tpu)
        or _from_open_mpi(environ)
    )


def _from_variables(environ: Mapping[str, str]) -> Plan | None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = {name: environ.get(name) or None for name in names}
    if not any(values.values()):
        return None
    _require_all(values, "set all three environment variables or none of them")
    address, count, index = values.values()
    if not (count.isdecimal() and index.isdecimal()):
        raise ValueError(f"JAX_NUM_PROCESSES={count!r} and JAX_PROCESS_ID={index!r} must be whole numbers.")
    return _checked("JAX_* environment variables", address, int(count), int(index))


def _from_slurm(environ: Mapping[str, str]) -> Plan | None:
    if "SLURM_JOB_ID" not in environ or _count(environ, "SLURM_NTASKS") < 2:
        return None
    needed = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # set by srun, not by sbatch itself
    if missing := [name for name in needed if name not in environ]:
        raise ValueError(
            f"Slurm announces SLURM_NTASKS={environ['SLURM_NTASKS']} tasks but {', '.join(missing)} is not "
            "set, so start the program with srun, or unset SLURM_NTASKS to run one process."
        )
    return Plan("Slurm", {})


def _from_cloud_tpu(environ: Mapping[str, str], platform: str | None, tpu: bool) -> Plan | None:
    if not (platform == "tpu" or (platform is None and tpu and not _is_cpu(platform, environ))):
        return None
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        if "," not in hosts:
            return None
        place = {"TPU_WORKER_ID": environ.get("TPU_WORKER_ID")}
        _require_all(place, "set it to this host's place in the list of hosts")
        return Plan("Cloud TPU hosts of the environment", {})
    if "TPU_SKIP_MDS_QUERY" in environ:  # the machine says it has no metadata server: a single host
        return None
    return Plan("Cloud TPU metadata", {})


def _from_open_mpi(environ: Mapping[str, str]) -> Plan | None:
    count = _count(environ, "OMPI_COMM_WORLD_SIZE")
    if count < 2:
        return None
    if "OMPI_MCA_orte_hnp_uri" not in environ:  # Open MPI 5 no longer tells the ranks where rank 0 is
        raise ValueError(
            f"Open MPI started {count} ranks but does not say where rank 0 is, so set in each rank "
            "JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES=$OMPI_COMM_WORLD_SIZE and "
            "JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK."
        )
    return Plan("Open MPI", {})


def _checked(source: str, coordinator: str, num_processes: int, process_id: int) -> Plan:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{coordinator=} must be written host:port, for example 10.0.0.1:8476.")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"{process_id=} must be at least 0 and below {num_processes=}.")
    names = ("coordinator_address", "num_processes", "process_id")
    return Plan(source, dict(zip(names, (coordinator, num_processes, process_id), strict=True)))


def _require_all(values: Mapping[str, Any], way_out: str) -> None:
    missing = [name for name, value in values.items() if value is None]
    if missing:
        needed, lacking = ", ".join(values), ", ".join(missing)
        raise ValueError(f"A multi-host start needs {needed}, but {lacking} is missing: {way_out}.")


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "1")
    return int(text) if text.isdecimal() else 1


def _is_cpu(platform: str | None, environ: Mapping[str, str]) -> bool:
    return (platform or environ.get("JAX_PLATFORMS", "")).lower() == "cpu"


def _has_tpu_chips() -> bool:
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(path.read_text().strip() == _GOOGLE_PCI_VENDOR for path in vendors)


# ---------------------------------------------------------------------------------------------------------
# What hosts agree on. With one process these are free; with several each is a small device collective,
# which waits for the work already queued on the devices, so the training loop asks every few steps only.


def is_main() -> bool:
    """Whether this is process 0, the only one that writes logs, plots and manifests."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has arrived at the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether the flag is true on at least one process; all processes get the same answer."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag, np.int32))))


def all_agree_stop(flag: bool) -> bool:
    """Whether to stop: true everywhere as soon as any host wants to (a signal may reach only one of them)."""
    return any_process(flag)


def broadcast(value: Any) -> Any:
    """Process 0's JSON-able value on every process, so that all follow the same decision."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    buffer = np.zeros(length, np.uint8)  # other processes only need the right shape
    if is_main():
        buffer[:] = text
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))))
