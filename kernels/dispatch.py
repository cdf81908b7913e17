"""Which implementation of an operation runs, and the one place where an operation meets the device mesh.

An implementation is a function of one argument tree (a registered dataclass of arrays and static options). `None` asks
for the best one of the platform compiled for; a name asks for that one or for an error that says why not. Under a mesh
(`with jax.set_mesh(mesh)`) the operation runs in `jax.shard_map`, because a kernel is opaque to the partitioner.

Letters of a layout string, one per array axis: b batch, h query heads, k key/value heads, t time of queries, s time of
keys, anything else not sharded.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from kernels import pallas
from kernels.sequence import Axis, Exchange

ACCELERATORS = ("tpu", "cuda", "rocm")
# Accelerators whose kernels `implementation=None` prepares beside the CPU's form. A process that will not compile for
# them may leave them out, which makes tracing faster: KERNELS_FOR="" for a CPU alone, "tpu" or "tpu,cuda" for some.
PREPARED = tuple(name for name in os.environ.get("KERNELS_FOR", ",".join(ACCELERATORS)).split(",") if name)
BATCH_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"
TIME_AXIS = "sequence"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: what `implementation=` selects.
        function: argument tree -> result.
        why_unsupported: argument tree -> a sentence saying why it cannot run on these arguments, or None.
        platforms: platforms ("cpu", "tpu", "cuda", "rocm") for which `implementation=None` may take it.
    """

    name: str
    function: Callable[[Any], Any]
    why_unsupported: Callable[[Any], str | None] = lambda arguments: None
    platforms: tuple[str, ...] = ("cpu", *ACCELERATORS)


if unknown := set(PREPARED) - set(ACCELERATORS):
    raise ValueError(
        f"KERNELS_FOR names {sorted(unknown)}; it may name {', '.join(ACCELERATORS)}, or nothing"
    )


def run(implementations: Sequence[Implementation], name: str | None, arguments: Any) -> Any:
    """Runs the named implementation, or for None the first usable one of the list for the platform compiled for.

    Raises:
        ValueError: the name is unknown, or the named one cannot run (with its reason and what is available);
            or nothing usable remains for the default.
    """
    reasons = {each.name: each.why_unsupported(arguments) for each in implementations}
    usable = [each for each in implementations if reasons[each.name] is None]
    if name is not None:
        here = {each.name: reasons[each.name] or _why_not_here(each) for each in implementations}
        return _named(implementations, name, here)(arguments)
    first = {p: next((e for e in usable if p in e.platforms), None) for p in ("cpu", *ACCELERATORS)}
    if first["cpu"] is None:
        raise ValueError(f"no implementation can run on these arguments: {_sentences(reasons)}")
    special = {p: first[p].function for p in PREPARED if first[p] not in (None, first["cpu"])}
    return _by_platform(special, first["cpu"].function, arguments)


def over_mesh(
    operation: Callable[[Any], Any],
    arguments: Any,
    layout: Any,
    out_layout: Any,
    sequence: tuple[Exchange, ...] = (),
) -> Any:
    """Runs `operation(arguments)` on each device's share of batch, heads and, where it has an exchange, time.

    Batch goes to the mesh axes "data" and "fsdp", heads to "tensor". An axis that does not divide its dimension is not
    used for it: every device along it then computes the same. If "tensor" divides the query heads and is a multiple of
    the key/value heads, each key/value head is copied to the devices whose query heads read it; if it fits neither way,
    heads are not split. Time goes to "sequence" by the first of the exchanges that fits; if none does (the axis does
    not divide T or S, as in a step of decoding, or they cannot honour the mask) operands enter whole along it. No mesh,
    a mesh of one device, or axes that are already manual (inside another shard_map) leave the operation as it is.

    Args:
        operation: a function of the argument tree that works on local sizes.
        arguments: the tree; Python numbers in it stay Python numbers.
        layout: the same tree with a layout string for every leaf.
        out_layout: a tree of layout strings for the result.
        sequence: how shards of time work together, see `kernels.sequence`; in order of preference.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = {name: mesh.shape[name] for name, kind in kinds.items() if kind != AxisType.Manual}
    if math.prod(free.values()) == 1:
        return operation(arguments)
    operands, letters, rebuild = _arrays(arguments, layout)
    sizes = _sizes(operands, letters)
    axes, copies = _mesh_axes(free, sizes)
    time = Axis(TIME_AXIS, free.get(TIME_AXIS, 1))
    exchange, whole = _exchange(sequence, arguments, sizes, time.size), ""
    if exchange is not None:
        # What an exchange wants whole is gathered inside: its gradient then comes back in shards, not as a sum for all.
        whole = "".join(x for x in "ts" if x not in exchange.letters and sizes.get(x, 1) % time.size == 0)
        axes |= dict.fromkeys(exchange.letters + whole, TIME_AXIS)
        operation = partial(exchange.function, operation, axis=time)

    def local(*shards):
        return operation(
            rebuild([_gather(x, text, whole, time) for x, text in zip(shards, letters, strict=True)])
        )

    specs = tuple(_spec(text, axes) for text in letters)
    operands = [_copy_heads(x, text, copies) for x, text in zip(operands, letters, strict=True)]
    if all(
        kinds[name] == AxisType.Explicit for name in free
    ):  # such meshes refuse to move operands by themselves
        operands = [jax.reshard(x, spec) for x, spec in zip(operands, specs, strict=True)]
    # The loops inside start from constants, which the varying-axes check would reject; gradients stay right without it.
    return jax.shard_map(
        local,
        in_specs=specs,
        out_specs=jax.tree.map(lambda text: _spec(text, axes), out_layout),
        axis_names=set(free),
        check_vma=False,
    )(*operands)


def with_letters(tree: Any, **letters: str) -> Any:
    """A layout from a dataclass: each named field that is not None becomes its string of letters."""
    present = {name: text for name, text in letters.items() if getattr(tree, name) is not None}
    return dataclasses.replace(tree, **present)


def mask_layout(mask: Any) -> Any:
    """The layout of a `kernels.masks.Mask`."""
    return with_letters(mask, q_offset="", q_segments="bt", kv_segments="bs", starts="b", lengths="b")


def _why_not_here(implementation):
    """A kernel for one platform can be named there only; see `kernels.pallas`."""
    return pallas.why_not_here(implementation.platforms[0]) if len(implementation.platforms) == 1 else None


def _named(implementations, name, reasons):
    found = next((each for each in implementations if each.name == name), None)
    available = ", ".join(repr(n) for n, reason in reasons.items() if reason is None) or "none"
    if found is None:
        raise ValueError(f"implementation={name!r} does not exist; available here: {available}")
    if reasons[name] is not None:
        raise ValueError(f"implementation={name!r} cannot run: {reasons[name]}; available here: {available}")
    return found.function


def _sentences(reasons):
    return "; ".join(f"{name}: {reason or 'not for this platform'}" for name, reason in reasons.items())


def _by_platform(special, default, arguments):
    if not special:
        return default(arguments)
    arrays, _, rebuild = _arrays(arguments, arguments)

    def bind(function):
        return lambda *arrays: function(rebuild(arrays))

    branches = {platform: bind(function) for platform, function in special.items()}
    return jax.lax.platform_dependent(*arrays, default=bind(default), **branches)


def _arrays(arguments, layout):
    """The arrays of a tree, their entries in `layout`, and how to put arrays back beside the tree's Python numbers."""
    leaves, tree = jax.tree.flatten(arguments)
    places = [n for n, leaf in enumerate(leaves) if not isinstance(leaf, (int, float))]
    letters = tree.flatten_up_to(layout)

    def rebuild(arrays):
        found = dict(zip(places, arrays, strict=True))
        return tree.unflatten([found.get(n, leaf) for n, leaf in enumerate(leaves)])

    return [leaves[n] for n in places], [letters[n] for n in places], rebuild


def _sizes(leaves, letters):
    """Size of each lettered dimension, read from the first operand that has it."""
    sizes = {}
    for leaf, text in zip(leaves, letters, strict=True):
        for letter, size in zip(text, jnp.shape(leaf), strict=True):
            sizes.setdefault(letter, size)
    return sizes


def _mesh_axes(free, sizes):
    """Mesh axes of the letters b, h and k, and how often each key/value head is repeated first."""
    batch, share = [], 1
    for name in BATCH_AXES:
        if name in free and sizes["b"] % (share * free[name]) == 0:
            batch.append(name)
            share *= free[name]
    tensor = free.get(HEAD_AXIS, 1)
    heads, kv_heads = sizes.get("h", 1), sizes.get("k", sizes.get("h", 1))
    if tensor == 1 or heads % tensor or (kv_heads % tensor and tensor % kv_heads):
        return {"b": tuple(batch)}, 1
    return {"b": tuple(batch), "h": HEAD_AXIS, "k": HEAD_AXIS}, max(1, tensor // kv_heads)


def _exchange(candidates, arguments, sizes, devices):
    """The first way to split time over `devices` that divides the lengths and honours the arguments, or None."""
    for each in candidates if devices > 1 else ():
        if all(sizes.get(letter, 0) % devices == 0 for letter in each.letters) and each.fits(
            arguments, devices
        ):
            return each
    return None


def _gather(leaf, text, whole, axis):
    """A shard with the time axes named in `whole` put together from all devices."""
    for letter in whole:
        if letter in text:
            leaf = jax.lax.all_gather(leaf, axis.name, axis=text.index(letter), tiled=True)
    return leaf


def _copy_heads(leaf, text, copies):
    return jnp.repeat(leaf, copies, axis=text.index("k")) if copies > 1 and "k" in text else leaf


def _spec(text, axes):
    return PartitionSpec(*(axes.get(letter) or None for letter in text))
