"""Where activations lie under a mesh: batch over the data axes, length over the sequence axis, channels whole.

Without this hint the partitioner may follow the parameters' sharding instead and gather the batch. No-op without a
mesh (`jax.set_mesh`), and for dimensions an axis does not divide.
"""

import math

import jax
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")


def constrain_hidden(x: jax.Array) -> jax.Array:
    """x [B, T, C], laid out as the module says."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x

    def dividing(axes: tuple[str, ...], size: int):
        return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None

    return jax.lax.with_sharding_constraint(
        x, P(dividing(BATCH_AXES, x.shape[0]), dividing(("sequence",), x.shape[1]))
    )
