"""The machines kernels are compiled for, none of which has to be here, and the compile itself."""

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import pallas

TPU_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# Device descriptions in XLA's own format: capability, cores, shared memory and bandwidth of an A100 and an H100.
_GPU = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared_core} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
  l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_optin} cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 7 }}  runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""
GPU_DESCRIPTIONS = {
    "sm_80": _GPU.format(
        shared_core=167936, cores=108, fpus=64, bandwidth=2039000000000, l2=41943040, clock=1.41,
        memory=85899345920, shared_optin=166912, major=8, name="NVIDIA A100-SXM4-80GB",
    ),
    "sm_90": _GPU.format(
        shared_core=233472, cores=132, fpus=128, bandwidth=3352320000000, l2=52428800, clock=1.98,
        memory=84929347584, shared_optin=232448, major=9, name="NVIDIA H100 80GB HBM3",
    ),
}  # fmt: skip


def platform(target: str) -> str:
    """Either "tpu" or "cuda". Raises ValueError for a target that is not known."""
    if target not in (*TPU_TOPOLOGIES, *GPU_DESCRIPTIONS):
        known = ", ".join((*TPU_TOPOLOGIES, *GPU_DESCRIPTIONS))
        raise ValueError(f"target {target!r} is unknown; known: {known}")
    return "tpu" if target in TPU_TOPOLOGIES else "cuda"


def devices(target: str) -> list:
    """Devices of the target's topology, as the compiler plugin describes them."""
    if platform(target) == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=TPU_TOPOLOGIES[target]).devices
    options = {"topology": "1x1x1", "target_config": GPU_DESCRIPTIONS[target]}
    return topologies.get_topology_desc("", "cuda", **options).devices


def compile_for(target: str, function, *shapes) -> jax.stages.Compiled:
    """Compiles function(*shapes) (trees of `jax.ShapeDtypeStruct`) for one device of the target."""
    mesh = Mesh(np.array(devices(target)[:1]), ("device",))
    here = NamedSharding(mesh, PartitionSpec())
    with pallas.compiling_for(platform(target)):
        return jax.jit(function, in_shardings=here, out_shardings=here).lower(*shapes).compile()
