"""What every Pallas kernel here shares: which machine it is built for, and running it on a machine that it is not for.

A Pallas implementation asked for by name runs on its own platform. Elsewhere say what is meant:

    with pallas.interpreted():            # simulate it with JAX operations on this machine: slow, for tests
    with pallas.compiling_for("tpu"):     # trace it for a compiler's target that is not the default backend
"""

import contextlib
from contextvars import ContextVar
from typing import Any

import jax

_interpret: ContextVar[Any] = ContextVar("interpret", default=False)
_target: ContextVar[str | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def interpreted(how: Any = True):
    """Pallas kernels traced inside are simulated: True (fast), or a `pltpu.InterpretParams` (finds races)."""
    token = _interpret.set(how)
    try:
        yield
    finally:
        _interpret.reset(token)


@contextlib.contextmanager
def compiling_for(platform: str):
    """Kernels traced inside may be named if they are for `platform` ("tpu", "cuda"), whatever this machine has."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def interpret() -> Any:
    """The `interpret=` of a `pallas_call` traced now. Read it once at entry: a backward pass may be traced later."""
    return _interpret.get()


def why_not_here(platform: str) -> str | None:
    """Why a kernel for `platform` cannot be asked for by name here, or None."""
    here = _target.get() or {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if _interpret.get() is not False or here == platform:
        return None
    return (
        f"it is compiled for {platform} and this is {here}; trace it under kernels.pallas.interpreted() to simulate "
        f'it, or under kernels.pallas.compiling_for("{platform}") to compile for that target'
    )
