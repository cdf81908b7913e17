"""Holds an operation on eight fake devices, or fewer, to what one device makes of it."""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tests.kernels.contract import OpContract, relative_error

AXES = ("data", "fsdp", "sequence", "tensor")


def mesh_of(shape: tuple[int, ...], kind: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of the axes above over the first devices."""
    return Mesh(
        np.array(jax.devices()[: np.prod(shape)]).reshape(shape), AXES, axis_types=(kind,) * len(AXES)
    )


def assert_equals_one_device(
    contract: OpContract, case, shape, implementation="blockwise", kind=AxisType.Auto, bound=1e-5
):
    """Every output and gradient of a case on a mesh, against the reference on one device, float32 both."""
    operands = contract.draw(case, np.float32)
    want = contract.evaluate(case, "reference", operands)
    with jax.set_mesh(mesh_of(shape, kind)):
        got = contract.evaluate(case, implementation, operands)
    for found, expected, what in zip(got, want, ("output", "gradient"), strict=True):
        assert set(found) == set(expected)
        for name, x in found.items():
            if not np.issubdtype(x.dtype, np.floating):
                np.testing.assert_array_equal(x, expected[name], name)
                continue
            error = relative_error(x, expected[name])
            assert error <= bound, f"{what} {name}: {error:.1e} > {bound:.0e}"


def collectives(function, *operands, shape) -> set[str]:
    """The kinds of exchange between devices in function's program on a mesh."""
    with jax.set_mesh(mesh_of(shape)):
        text = jax.jit(function).lower(*operands).as_text()
    kinds = ("collective_permute", "all_gather", "all_reduce", "reduce_scatter", "all_to_all")
    return {kind for kind in kinds if f"stablehlo.{kind}" in text}


def largest_exchanges(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The kinds of exchange in a compiled program, with the numbers in the largest array of each."""
    kinds, found = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute", {}
    for shapes, kind in re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", compiled.as_text()):
        sizes = [
            math.prod(map(int, filter(None, shape.split(","))))
            for shape in re.findall(r"\[([\d,]*)\]", shapes)
        ]
        found[kind] = max(found.get(kind, 0), *sizes)
    return found
