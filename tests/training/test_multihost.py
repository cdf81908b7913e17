"""Joining other processes: who decides, what is refused, and a real job of two processes on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.training import multihost
from attnlab.training.checkpoints import Checkpoints

REPOSITORY = pathlib.Path(__file__).parents[2]
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
SRUN = {**SLURM, "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
TPU_HOSTS = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}


def choose(environ, *, explicit=(None, None, None), platform=None, tpu=False):
    return multihost.choose(*explicit, environ, platform, tpu)


# --- who decides -------------------------------------------------------------------------------------------


def test_arguments_come_before_variables_before_slurm():
    everything = {**VARIABLES, **SRUN}
    plan = choose(everything, explicit=("h:1", 2, 0))
    assert plan.source == "arguments"
    assert plan.arguments == {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0}
    plan = choose(everything)
    assert plan.source == "JAX_* environment variables"
    assert plan.arguments == {"coordinator_address": "10.0.0.1:99", "num_processes": 3, "process_id": 2}
    assert choose({**SRUN, **OPEN_MPI}).source == "Slurm"


@pytest.mark.parametrize(
    ("environ", "options", "source"),
    [
        ({}, {}, None),
        (SRUN, {}, "Slurm"),
        ({**SRUN, "SLURM_NTASKS": "1"}, {}, None),
        (OPEN_MPI, {}, "Open MPI"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, {}, None),
        (TPU_HOSTS, {"tpu": True}, "Cloud TPU hosts of the environment"),
        (TPU_HOSTS, {"platform": "tpu"}, "Cloud TPU hosts of the environment"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {"tpu": True}, None),
        ({}, {"tpu": True}, "Cloud TPU metadata"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, {"tpu": True}, None),
        (TPU_HOSTS, {"tpu": True, "platform": "cpu"}, None),
        ({**TPU_HOSTS, "JAX_PLATFORMS": "cpu"}, {"tpu": True}, None),
        (TPU_HOSTS, {}, None),  # no chip in this machine
    ],
)
def test_launchers_are_recognised(environ, options, source):
    plan = choose(environ, **options)
    assert (plan and plan.source) == source
    assert not plan or plan.arguments == {}  # JAX reads the rest from the launcher itself


@pytest.mark.parametrize(
    ("explicit", "environ", "sentence"),
    [
        (
            ("h:1", None, None),
            {},
            "but num_processes, process_id is missing: give all three arguments or none",
        ),
        ((None, None, 0), VARIABLES, "but coordinator, num_processes is missing"),
        (
            (None, None, None),
            {"JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is missing: set",
        ),
        ((None, None, None), {**VARIABLES, "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'"),
        (("host", 2, 0), {}, "coordinator='host' must be written host:port"),
        (("h:1", 2, 2), {}, "process_id=2 must be at least 0 and below num_processes=2"),
        (
            (None, None, None),
            SLURM,
            "SLURM_STEP_NODELIST, SLURM_PROCID, SLURM_LOCALID is not .*start .* with srun",
        ),
        ((None, None, None), {"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI started 2 ranks but does not say"),
    ],
)
def test_incomplete_starts_are_refused_in_one_sentence(explicit, environ, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose(environ, explicit=explicit)


def test_tpu_hosts_without_own_place_are_refused():
    with pytest.raises(ValueError, match="TPU_WORKER_ID is missing"):
        choose({"TPU_WORKER_HOSTNAMES": "a,b"}, platform="tpu")


@pytest.mark.smoke
def test_one_process_needs_no_one(monkeypatch):
    for name in [*VARIABLES, *SRUN, *TPU_HOSTS, *OPEN_MPI]:
        monkeypatch.delenv(name, raising=False)
    assert multihost.initialize(platform="cpu") == "single process"
    assert multihost.is_main()
    assert multihost.all_agree_stop(True) and not multihost.all_agree_stop(False)
    assert multihost.broadcast({"a": [1, None]}) == {"a": [1, None]}
    multihost.barrier("alone")


# --- two processes -----------------------------------------------------------------------------------------

_WORKER = """
import sys, warnings
import numpy as np
from attnlab.training import multihost
index, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
arguments = dict(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=index, platform="cpu")
assert multihost.initialize(**arguments) == "arguments"
assert multihost.initialize(**arguments) == "already initialized"
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from attnlab.training.checkpoints import CheckpointConfig, Checkpoints, CheckpointWarning

assert jax.process_count() == 2 and jax.device_count() == 4 and jax.local_device_count() == 2
assert multihost.is_main() == (index == 0)
mesh = jax.make_mesh((4,), ("fsdp",))
cut, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())

def sharded(values):
    return jax.make_array_from_callback(values.shape, cut, lambda index: values[index])

values = np.arange(24, dtype=np.float32).reshape(8, 3)
total = jax.jit(jnp.sum, out_shardings=whole)(sharded(values))
assert float(total) == 276.0

assert not multihost.all_agree_stop(False)
assert multihost.all_agree_stop(index == 1)  # one host is enough
assert multihost.broadcast(["from", index]) == ["from", 0]
multihost.barrier("done with collectives")

template = {"w": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=cut)}
def check(state, wanted):
    for shard in state["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, wanted[shard.index])

with Checkpoints(directory, CheckpointConfig(every=1)) as checkpoints:
    for step in (1, 2, 3):
        assert checkpoints.save(step, {"w": sharded(step * values)})
        assert not checkpoints.save(step, {"w": sharded(0 * values)})
    checkpoints.wait()
    multihost.barrier("manifests are written")
    step, state = checkpoints.restore_latest(template)
    assert step == 3
    check(state, 3 * values)

if index == 1:  # damage the newest step where process 0 does not look first
    import pathlib
    file = max(pathlib.Path(directory, "00000003").rglob("ocdbt.process_1/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
multihost.barrier("damaged")
with warnings.catch_warnings(record=True) as caught, Checkpoints(directory, CheckpointConfig(every=1)) as checkpoints:
    warnings.simplefilter("always")
    step, state = checkpoints.restore_latest(template)
    assert step == 2
    check(state, 2 * values)
    told = [w for w in caught if w.category is CheckpointWarning]
    assert len(told) == (1 if index == 0 else 0)  # only process 0 speaks
    assert checkpoints.save(3, {"w": sharded(30 * values)})  # both replace the damaged step
print("fine", index)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_worker(index: int, port: int, directory: pathlib.Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-c", _WORKER, str(index), str(port), str(directory)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.processes
def test_two_processes_sum_agree_save_and_restore(tmp_path):
    port = free_port()
    workers = [start_worker(index, port, tmp_path) for index in range(2)]
    try:
        outputs = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for index, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
        assert worker.returncode == 0 and f"fine {index}" in output, output[-3000:]

    # What two processes saved, one process restores onto a mesh of its own.
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("fsdp",))
    cut = NamedSharding(mesh, P("fsdp"))
    with Checkpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore_latest(
            {"w": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=cut)}
        )
    assert step == 3
    np.testing.assert_array_equal(state["w"], 30 * np.arange(24, dtype=np.float32).reshape(8, 3))
