"""Where every array lives on the mesh: one table for parameters, one line for batches.

Mesh axes: `data` (batch), `fsdp` (batch, and parameters cut up), `sequence` (length), `tensor` (heads, inner widths,
vocabulary). A parameter which no rule covers is an error: a forgotten rule would replicate it on every device.
"""

import dataclasses
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.training.trees import named_leaves, path_name

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = P(("data", "fsdp"), "sequence")  # [B, T] arrays

# (parameter path, mesh axis of each of its last dimensions); the first match wins. Leading dimensions, such as the
# layers stacked by a scan, are whole on every device.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding$", ("tensor", "fsdp")),  # [V, C]
    (r"(^|/)head$", ("fsdp", "tensor")),  # [C, V]
    (r"(^|/)(frozen_)?(query|key|value)/kernel$", ("fsdp", "tensor")),  # [C, heads]
    (r"(^|/)(output_gate|gate|up|factor_[ab])/kernel$", ("fsdp", "tensor")),  # [C, heads or inner width]
    (r"(^|/)(out|down)/kernel$", ("tensor", "fsdp")),  # [heads or inner width, C]
    (r"(^|/)(frozen_)?(query|key|value|gate|up)/bias$", ("tensor",)),  # [heads or inner width]
    (r"(^|/)(forget_gate|decay|key_shift|value_shift)/kernel$", ("fsdp", None)),  # [C, H]: H is small
    (r"(^|/)(frozen_)?(table|noise|row_factor|column_factor)$", ("tensor", None, None)),  # [H, N, N or rank]
    (r"(^|/)(mixing|logit_kernel)$", ("tensor", None, None)),  # [H, N or D, N]
    (r"(^|/)(mixing_bias|logit_bias)$", ("tensor", None)),  # [H, N]
    (r"(^|/)(query|key|value)_conv$", (None, "tensor")),  # [width of the convolution, heads]
    (r"(^|/)initial_(key|value)_slots$", (None, None, None)),  # [K, slots, D]: K may be one
    (r"(^|/)(query|key|value)_trop$", (None, None)),  # [D, D] or [H, D, D]
    (r"(^|/)(frozen_)?random_stream$", (None, "fsdp")),  # [N, C]
    (r"(^|/)input/kernel$", (None, "fsdp")),  # [features, C]
    (r"(^|/)head/kernel$", ("fsdp", None)),  # [C, outputs]
    (r"(bias|scale)$", (None,)),  # norms and what else has one number a channel or head
    (r"(^|/)(sink|alpha|frequencies|lambda_param|slope_logit)$", (None,)),  # likewise
    (r"^rng$", (None,)),  # the key data in a training state
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # -1: all devices the other axes leave
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def shape(self, devices: int) -> tuple[int, ...]:
        """Sizes of the axes for `devices` devices; ValueError when they do not fit."""
        sizes = [getattr(self, axis) for axis in AXES]
        fixed = math.prod(size for size in sizes if size != -1)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh {self} needs sizes of at least 1, and at most one -1")
        if -1 in sizes and devices % fixed == 0:
            sizes[sizes.index(-1)] = devices // fixed
        if math.prod(sizes) != devices:
            raise ValueError(
                f"mesh {dict(zip(AXES, sizes, strict=True))} does not fill {devices} devices; "
                "choose sizes whose product is their number, or -1 for one of them"
            )
        return tuple(sizes)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh over `devices` (default: all of the job's), neighbours on the hardware beside each other.

    On several TPU slices the data axis runs across slices, so that only gradient sums use the slow network.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = config.shape(len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        if shape[0] % len(slices):
            raise ValueError(
                f"mesh.data={shape[0]} must be a multiple of the {len(slices)} slices of this job"
            )
        within = (shape[0] // len(slices), *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(within, (len(slices), 1, 1, 1), devices)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices)
    else:
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh, rules=RULES) -> P:
    """The partition of the array called `name`; ValueError if no rule covers it or an axis does not divide it."""
    if not shape:
        return P()
    for pattern, axes in rules:
        if re.search(pattern, name):
            return _checked(name, shape, axes, mesh)
    raise ValueError(f"no sharding rule covers parameter {name!r} of shape {shape}; add one to RULES")


def _checked(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> P:
    axes = (None,) * (len(shape) - len(axes)) + axes[-len(shape) :]
    for size, axis in zip(shape, axes, strict=True):
        if axis and size % mesh.shape[axis]:
            raise ValueError(
                f"parameter {name!r} of shape {shape} cannot be cut into {mesh.shape[axis]} along {size} for mesh axis "
                f"{axis!r}; change the model's size or the mesh"
            )
    return P(*axes)


def tree_shardings(tree, mesh: Mesh, rules=RULES):
    """NamedShardings for a tree of arrays or shapes whose leaf names end in parameter names, as Adam's moments do."""

    def place(path, leaf):
        return NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(place, tree)


def describe(tree, mesh: Mesh) -> str:
    """One line: parameters in all, and on each device."""
    leaves = named_leaves(tree)
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    local = 0
    for name, leaf in leaves.items():
        axes = [axis for axis in spec_of(name, leaf.shape, mesh) if axis]
        local += math.prod(leaf.shape) // math.prod(mesh.shape[axis] for axis in axes)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{total:,} parameters, {local:,} a device on mesh {shape}"
