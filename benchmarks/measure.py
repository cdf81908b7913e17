"""Measures one operation at one length in this process, which the harness starts anew for every measurement.

    python -m benchmarks.measure OPERATION LENGTH HEADS SIZE REPEATS FORM...

prints one line of JSON. Forward and backward of every form are timed, the forms taking turns; before, their outputs and
gradients are compared, so that what is timed is the same thing.
"""

import json
import resource
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import forms

AGREEMENT = 1e-3  # largest difference over largest value, of float32 results computed in different orders


def main(operation: str, length: int, heads: int, size: int, repeats: int, names: list[str]) -> dict:
    """{"seconds": {form: median}, "peak_bytes": growth of the process in the first run of a single form, or None}.

    Raises ArithmeticError if the forms' outputs or gradients differ.
    """
    operands = forms.operands(operation, 1, length, heads, size)
    steps = {name: _step(operation, name, operands) for name in names}
    before = _peak()
    results = {name: step() for name, step in steps.items()}  # compiles, and warms up
    peak = _peak() - before if len(steps) == 1 else None
    _compare(operation, results)
    seconds = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {"seconds": {n: statistics.median(s) for n, s in seconds.items() if s}, "peak_bytes": peak}


def _step(operation, form, operands):
    """A function of nothing that runs forward and backward: [o, then a gradient for every operand]."""
    return _torch_step(operation, operands) if form == "torch" else _jax_step(operation, form, operands)


def _jax_step(operation, form, operands):
    function, arrays = forms.jax_form(operation, form), [jnp.asarray(x) for x in operands.values()]
    cotangent = jnp.ones_like(arrays[0])

    def both(*arrays):
        o, pull = jax.vjp(function, *arrays)
        return o, *pull(cotangent)

    compiled = jax.jit(both).lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


def _torch_step(operation, operands):
    import torch

    from benchmarks.torch_forms import torch_form

    function = torch_form(operation)
    tensors = [torch.from_numpy(x).requires_grad_() for x in operands.values()]
    cotangent = torch.ones_like(tensors[0])

    def step():
        o = function(*tensors)
        return o.detach(), *torch.autograd.grad(o, tensors, cotangent)

    return step


def _compare(operation, results):
    first, *others = results
    for other in others:
        for n, (x, y) in enumerate(zip(results[first], results[other], strict=True)):
            x, y = np.asarray(x), np.asarray(y)
            difference = np.abs(x - y).max() / np.abs(x).max()
            if not difference < AGREEMENT:
                what = "output" if n == 0 else f"gradient {n}"
                raise ArithmeticError(
                    f"{operation}: {what} of {other} differs from {first} by {difference:.1e}"
                )


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6:])))
