"""Attention over keys that lie on many devices: every device keeps its queries, and shards of keys go round in a ring.

Letters: B batch, T queries and S keys of a shard; n the devices along the axis, of which device r holds the r-th shard;
z ("source") the shard whose keys are here. Functions run inside `jax.shard_map`, on local shards.

    step s of device r:   part = local(rows of r, keys of z),  z = r - s (mod n);   total <- join(total, part)

A row softmax joins (o, lse), sums join by adding, maxima by comparing; each part's gradient follows from the total.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels import pallas, sequence
from kernels.masks import Mask
from kernels.sequence import Axis


def can_ring(mask: Mask, T: int, S: int) -> bool:
    """Causal masks need the order of shards to be that of positions; all others can be shifted as they are."""
    return not mask.causal or sequence.own_sequence(mask, T, S)


def ring_of_keys(
    local: Callable,
    joining: Any,
    arguments: Any,
    names: tuple[str, ...],
    axis: Axis,
    stay: Any = None,
    travel: Any = None,
) -> Any:
    """The ring for attention: local(source, arguments, stay, travel), joined over all key shards this device needs.

    `local` gets the arguments of this device with the fields `names`, the keys' segments and `travel` those of shard
    `source`, and with the mask of these rows over these keys. Shards that causality hides are passed on unread, and
    those behind a window are not even waited for.
    """
    mask, T, S = arguments.mask, arguments.q.shape[1], arguments.k.shape[1]
    bare = dataclasses.replace(arguments, mask=None, **dict.fromkeys(names))
    unsegmented = dataclasses.replace(mask, q_segments=None, kv_segments=None)

    def over_shard(source, staying, travelling):
        (bare, mask, rows, stay), (keys, cols, travel) = staying, travelling
        mask = dataclasses.replace(mask, q_segments=rows, kv_segments=cols)
        whole = dataclasses.replace(bare, mask=shifted(mask, axis, source, T, S), **keys)
        return local(source, whole, stay, travel)

    needed = (lambda source: source <= axis.index) if mask.causal else None
    count = axis.size if mask.window is None else min(axis.size, 1 + -(-(mask.window - 1) // S))
    staying = bare, unsegmented, mask.q_segments, stay
    travelling = {name: getattr(arguments, name) for name in names}, mask.kv_segments, travel
    return ring(over_shard, joining, needed, count, staying, travelling, axis)


def shifted(mask: Mask, axis: Axis, source, T: int, S: int) -> Mask:
    """The mask of this device's T rows over the S keys of shard `source`.

    Segments of `mask` are those of the rows and of the keys that are here; starts and lengths count from the very
    first key.
    """
    first = source * S
    bounds = {name: getattr(mask, name) for name in ("starts", "lengths")}
    bounds = {name: None if x is None else jnp.clip(x - first, 0, S) for name, x in bounds.items()}
    return dataclasses.replace(mask, q_offset=mask.q_offset + axis.index * T - first, **bounds)


class Softmax:
    """Parts (o, lse) of a row softmax: o = sum of exp(lse_s - lse) o_s, lse = log of the sum of exp(lse_s)."""

    def start(self, part):
        o, lse = part
        return jnp.zeros(o.shape, lse.dtype), jnp.full(lse.shape, -jnp.inf, lse.dtype)

    def join(self, total, part):
        (o, lse), (o2, lse2) = total, part
        highest = jnp.maximum(lse, lse2)
        highest = jnp.where(highest > -jnp.inf, highest, 0)
        old, new = jnp.exp(lse - highest), jnp.exp(lse2 - highest)
        Z = old + new
        some = jnp.where(Z > 0, Z, 1)
        o = (old / some)[..., None] * o + (new / some)[..., None] * o2.astype(lse.dtype)
        return o, jnp.where(Z > 0, highest + jnp.log(some), -jnp.inf)

    def cotangent(self, total, d_total, part):
        (o, lse), (do, dlse), (o2, lse2) = total, d_total, part
        seen = lse2 > -jnp.inf
        share = jnp.where(seen, jnp.exp(jnp.where(seen, lse2 - lse, 0)), 0)
        moved = dlse + (do * (o2.astype(lse.dtype) - o)).sum(-1)
        return (share[..., None] * do).astype(o2.dtype), jnp.where(seen, share * moved, 0)


class Sum:
    """Parts that add up, leaf by leaf."""

    def start(self, part):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), part)

    def join(self, total, part):
        return jax.tree.map(jnp.add, total, part)

    def cotangent(self, total, d_total, part):
        return d_total


def ring(
    local: Callable, joining: Any, needed: Callable | None, count: int, stay: Any, travel: Any, axis: Axis
):
    """Joins local(source, stay, travel of shard `source`) over the shards source = r, r - 1, .. of `count` steps.

    `stay` and `travel` are trees of this device's arrays; `travel` goes round. Steps for which needed(source) is false
    cost nothing but the passing on. The gradient runs the ring again: every step takes `jax.vjp` of `local` with this
    part's share of the cotangent, and the gradients of a shard travel with it. So what is kept between the passes is
    one shard of everything, where unrolling and saving (or a scan with checkpoints, whose carry holds the shard) would
    keep n. Gradients are summed in at least float32.

    Args:
        local: must close over no arrays; traced anew in the backward pass.
        joining: how parts become the whole: `Softmax()`, `Sum()` or one like them.
        needed: source -> bool scalar; None: all steps are.
        count: steps, at most n.
    """
    plan = _Plan(_as_now(local), joining, needed, count, axis, *_sorted((stay, travel))[2:])
    of_stay, of_travel = _sorted(stay), _sorted(travel)
    return _ring(plan, of_stay[0], of_travel[0], of_stay[1], of_travel[1])


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is static about a ring; `numbers`, `kinds` and `tree` put sorted leaves back into (stay, travel)."""

    local: Callable
    joining: Any
    needed: Callable | None
    count: int
    axis: Axis
    numbers: dict
    kinds: tuple
    tree: Any

    def part(self, source, stay, travel, of_stay, of_travel):
        """`local` on sorted leaves: floats of both, then integers of both."""
        floats, integers = iter((*stay, *travel)), iter((*of_stay, *of_travel))
        leaves = [
            next(floats) if kind == "f" else next(integers) if kind == "i" else self.numbers[n]
            for n, kind in enumerate(self.kinds)
        ]
        return self.local(source, *jax.tree.unflatten(self.tree, leaves))

    def when_needed(self, source, compute, otherwise):
        return compute() if self.needed is None else lax.cond(self.needed(source), compute, lambda: otherwise)


def _sorted(tree):
    """Float arrays of a tree, its other arrays, its Python numbers by place, the kind of every leaf, its structure."""
    leaves, structure = jax.tree.flatten(tree)
    kinds = tuple(_kind(leaf) for leaf in leaves)
    floats = tuple(leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind == "f")
    integers = tuple(leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind == "i")
    numbers = {n: leaf for n, leaf in enumerate(leaves) if kinds[n] == "n"}
    return floats, integers, numbers, kinds, structure


def _kind(leaf):
    if isinstance(leaf, (int, float)):
        return "n"
    return "f" if jnp.issubdtype(leaf.dtype, jnp.floating) else "i"


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(plan, stay, travel, of_stay, of_travel):
    return _forward(plan, stay, travel, of_stay, of_travel)[0]


def _forward(plan, stay, travel, of_stay, of_travel):
    axis, index = plan.axis, plan.axis.index
    shapes = jax.eval_shape(lambda: plan.part(jnp.int32(0), stay, travel, of_stay, of_travel))

    def step(n, carry):
        total, visiting = carry
        onward = sequence.shift(visiting, axis)  # on its way while this step computes
        source = (index - n) % axis.size
        total = plan.when_needed(
            source,
            lambda: plan.joining.join(total, plan.part(source, stay, visiting[0], of_stay, visiting[1])),
            total,
        )
        return total, onward

    start = plan.joining.start(shapes), (travel, of_travel)
    total, _ = lax.fori_loop(0, plan.count, step, start)
    return total, (stay, travel, of_stay, of_travel, total)


def _backward(plan, residuals, d_total):
    stay, travel, of_stay, of_travel, total = residuals
    axis, index = plan.axis, plan.axis.index
    d_stay, d_travel = ([jnp.zeros(x.shape, _wide(x)) for x in tree] for tree in (stay, travel))

    def step(n, carry):
        d_stay, d_travel, visiting = carry
        onward, d_travel = sequence.shift(visiting, axis), sequence.shift(d_travel, axis)
        source = (index - n) % axis.size

        def compute():
            def part_of(stay, travel):
                return plan.part(source, stay, travel, of_stay, visiting[1])

            part, pull = jax.vjp(part_of, stay, visiting[0])
            more = pull(plan.joining.cotangent(total, d_total, part))
            return tuple(
                [x + y.astype(x.dtype) for x, y in zip(sums, new, strict=True)]
                for sums, new in zip((d_stay, d_travel), more, strict=True)
            )

        return *plan.when_needed(source, compute, (d_stay, d_travel)), onward

    start = d_stay, d_travel, (travel, of_travel)
    d_stay, d_travel, _ = lax.fori_loop(0, plan.count, step, start)
    d_travel = sequence.shift(d_travel, axis, 1 - plan.count)  # home
    return *(
        tuple(d.astype(x.dtype) for d, x in zip(sums, like, strict=True))
        for sums, like in ((d_stay, stay), (d_travel, travel))
    ), None, None  # fmt: skip


_ring.defvjp(_forward, _backward)


def _wide(x):
    return jnp.promote_types(jnp.float32, x.dtype)


def _as_now(function):
    """`function` with the interpreter of Pallas kernels in force now, whenever it is traced."""
    how = pallas.interpret()

    def as_now(*arguments):
        with pallas.interpreted(how):
            return function(*arguments)

    return as_now


def no_gradient(x: jax.Array) -> np.ndarray:
    """The cotangent of an integer result."""
    return np.zeros(x.shape, jax.dtypes.float0)
