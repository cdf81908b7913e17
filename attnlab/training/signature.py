"""What a state looks like without its values: the name, shape and dtype of every leaf.

Two states are of the same model and optimiser exactly if their signatures are equal; container types do not
matter (a checkpoint gives named tuples back as dicts), nor does the layout over devices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.training.trees import named_leaves

PyTree = Any
Leaf = tuple[tuple[int, ...], str]  # shape, dtype name
Signature = dict[str, Leaf]  # "params/layer_0/kernel" -> Leaf


def signature(tree: PyTree) -> Signature:
    """Name -> (shape, dtype) of every leaf, in the tree's order; leaves need `.shape` and `.dtype`."""
    leaves = named_leaves(tree).items()
    return {name: (tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for name, leaf in leaves}


def first_difference(found: Signature, wanted: Signature) -> str | None:
    """The first leaf that differs, in words, or None; parameters come before what is derived from them."""
    names = list(wanted) + [name for name in found if name not in wanted]
    for name in sorted(names, key=lambda name: "params" not in name.split("/")):
        here, there = wanted.get(name), found.get(name)
        if here != there:
            return f"{name} is {_words(there)} there and {_words(here)} here"
    return None


def check_saveable(state: PyTree) -> None:
    """Raises ValueError unless every leaf is a `jax.Array` of ordinary numbers."""
    for name, leaf in named_leaves(state).items():
        if not isinstance(leaf, jax.Array):
            kind = type(leaf).__name__
            raise ValueError(f"{name} is a {kind}: put it on the mesh with jax.device_put first.")
        _reject_typed_key(name, leaf)


def check_abstract(abstract_state: PyTree) -> None:
    """Raises ValueError unless every leaf says its shape, dtype and a sharding that fits the shape."""
    for name, leaf in named_leaves(abstract_state).items():
        _reject_typed_key(name, leaf)
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(f"{name} has no sharding: use jax.ShapeDtypeStruct(shape, dtype, sharding=...).")
        try:
            leaf.sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(f"{name}{list(leaf.shape)} does not fit its sharding: {error}") from error


def _reject_typed_key(name: str, leaf: Any) -> None:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(f"{name} is a typed random key: store jax.random.key_data(key) instead.")


def _words(leaf: Leaf | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"
