"""One line of the report: a kernel at one shape."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class KernelCase:
    """A kernel, forward or forward and backward, at one shape.

    Attributes:
        kernel: e.g. "forgetting".
        label: what tells the cases of one kernel apart, e.g. "T=4096 D=128 bf16".
        function: function(implementation, *operands) -> outputs (any tree); calls the public operation with
            `implementation=implementation`.
        operands: `jax.ShapeDtypeStruct`s; float ones are differentiated.
        backward: compile the gradient too, under cotangents of the outputs' shapes.
        quick: part of the short report, which the tests compile (one small shape a kernel).
        platforms: platforms that have the kernel.
        facts: figures to show beside, e.g. {"FLOPs": ...}.
    """

    kernel: str
    label: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    backward: bool = True
    quick: bool = False
    platforms: tuple[str, ...] = ("tpu", "cuda")
    facts: Mapping[str, float] = field(default_factory=dict)

    def program(self, platform: str) -> tuple[Callable, tuple]:
        """The function to compile and its operands."""
        name = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}[platform]

        def forward(*operands):
            return self.function(name, *operands)

        return (differentiated(forward), self.operands) if self.backward else (forward, self.operands)


def differentiated(function: Callable) -> Callable:
    """operands -> outputs and gradients of every float operand; the outputs themselves serve as cotangents."""

    def both(*operands):
        floats = [n for n, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating)]

        def of_floats(*some):
            whole = list(operands)
            for n, x in zip(floats, some, strict=True):
                whole[n] = x
            return function(*whole)

        outputs, pull = jax.vjp(of_floats, *(operands[n] for n in floats))
        cotangents = jax.tree.map(
            lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros(x.shape, jax.dtypes.float0),
            outputs,
        )
        return outputs, pull(cotangents)

    return both
