"""Signatures that state the shapes of arrays, and are held to them.

    @checked
    def attend(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"]) -> Float[Array, "B T H D"]: ...

The letters are bound from left to right: whoever meets B first fixes it for the whole call. The annotations are
jaxtyping's, so editors and other checkers read them too; only the message is ours. A single letter is written with a
space before it (" H"), or linters take it for the name of a type.
"""

import functools
import inspect
import types
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num, jaxtyped

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Num", "checked"]


def checked(function):
    """Decorator: array-likes given for annotated arguments become JAX arrays, and must have the annotated shape.

    ValueError with one sentence naming the argument, what it is and what was expected. Results are not checked here
    (the tests do), nor are arguments without an array annotation.
    """
    signature = inspect.signature(function)
    expected = {
        name: kinds for name, p in signature.parameters.items() if (kinds := _array_kinds(p.annotation))
    }

    @functools.wraps(function)
    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        with jaxtyped("context"):
            sizes: dict[str, int] = {}
            for name, kinds in expected.items():
                if bound.arguments.get(name) is not None:
                    bound.arguments[name] = _fit(function.__name__, name, bound.arguments[name], kinds, sizes)
        return function(*bound.args, **bound.kwargs)

    return call


def _array_kinds(annotation) -> tuple:
    """The jaxtyping array types in an annotation, which may be a union."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if union else (annotation,)
    return tuple(part for part in parts if hasattr(part, "dim_str"))


def _fit(function: str, name: str, value, kinds: tuple, sizes: dict[str, int]):
    if isinstance(value, (str, bool, int, float)):
        return value  # of another member of the union, such as "auto" or one number for all
    array = value if isinstance(value, jax.Array) else jnp.asarray(value)
    found = next((kind for kind in kinds if isinstance(array, kind)), None)
    if found is None:
        wanted = " or ".join(f"{kind.__name__.partition('[')[0]}[{kind.dim_str}]" for kind in kinds)
        known = ", ".join(
            f"{letter}={size}" for letter, size in sizes.items() if any(letter in k.dim_str for k in kinds)
        )
        raise ValueError(
            f"{function}: {name} is {array.dtype}{list(array.shape)}, expected {wanted}"
            + (f" with {known} from the arguments before it" if known else "")
        )
    letters = found.dim_str.split()
    if len(letters) == array.ndim:
        sizes.update(
            {a: n for a, n in zip(letters, array.shape, strict=True) if a.isidentifier() and a != "_"}
        )
    return array
