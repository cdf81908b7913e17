"""What surrounds the Pallas kernels of softplus attention: row vectors, blocks to visit, and the custom VJP.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D and Dv head sizes; m one of nq blocks of rows,
n one of nk blocks of keys. Every mask is two row vectors (first and last visible key) and, with documents, segments.
The gradients of gain and power follow by automatic differentiation from those of c_i and of p as row vectors.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels import masks
from kernels.forgetting.arguments import BlockSizes
from kernels.softplus.arguments import Arguments, Options
from kernels.softplus.counts import interval
from kernels.softplus.tiles import Rows
from kernels.softplus.weights import reciprocal

STATISTICS = ("Z", "tau", "M", "W", "shift")


@dataclass(frozen=True)
class Machine:
    """Kernels of one machine.

    forward(call, q, k, v, context, rows) -> o, statistics by name; backward(call, q, k, v, do, context, rows) -> dq,
    dk, dv and by name the row vectors "c" and "power". Arrays come and go as in the public call, row vectors as
    [B, H, T].
    """

    forward: Callable
    backward: Callable


@dataclass(frozen=True)
class Call:
    """What is fixed when a call is traced; `window` bounds how many blocks a block can see."""

    machine: Machine
    options: Options
    forward: BlockSizes
    backward: BlockSizes
    window: int | None
    interpret: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """Operands without gradient: row vectors [B, H, T] and integers [B, T] by name, and blocks to visit.

    key_segments: int32 [B, S] or None; forward_keys, keys: first and end key block per query block, int32 [B, nq, 2],
    for the block sizes of the forward and the backward pass; queries: the converse of the latter, int32 [B, nk, 2].
    """

    floats: Rows
    integers: Rows
    key_segments: jax.Array | None
    forward_keys: jax.Array
    keys: jax.Array
    queries: jax.Array


def attend(
    machine: Machine, arguments: Arguments, forward: BlockSizes, backward: BlockSizes, interpret: Any
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """o [B, T, H, Dv] in q's dtype and the row statistics (Z, tau, M, W), each [B, T, H]."""
    B, T, H, _ = arguments.q.shape
    call = Call(machine, arguments.options, forward, backward, arguments.mask.window, interpret)
    c = arguments.gain[:, None] * arguments.rows.factor[:, None]
    power = arguments.power
    power = power if power is None else jnp.broadcast_to(power[:, None], (B, H, T))
    operands = (arguments.q, arguments.k, arguments.v, c, power)
    o, statistics = _attend(call, operands, _context(arguments, forward, backward))
    return o, tuple(statistics[name].swapaxes(1, 2) for name in STATISTICS[:4])


def _context(arguments, forward, backward) -> Context:
    (B, T, H, _), S, mask = arguments.q.shape, arguments.k.shape[1], arguments.mask
    floats = {"bias": arguments.rows.bias} if arguments.options.biased else {}
    if arguments.options.power is not None:
        floats["threshold"] = arguments.rows.threshold
    if arguments.options.normalise != "l1":
        floats["share"] = arguments.rows.share
    floats = {name: jnp.broadcast_to(x[:, None], (B, H, T)) for name, x in floats.items()}
    first, last = interval(mask, T, S)
    integers = {"last": last if mask.q_segments is None else jnp.where(mask.q_segments == 0, -1, last)}
    if mask.window is not None or mask.starts is not None:
        integers["first"] = first
    if mask.q_segments is not None:
        integers["segment"] = mask.q_segments
    if arguments.slopes is not None:
        floats["slope"] = jnp.broadcast_to(arguments.slopes[:, None], (B, H, T))
        integers["position"] = mask.q_offset + jnp.arange(T)[None]
    integers = {name: jnp.broadcast_to(x, (B, T)).astype(jnp.int32) for name, x in integers.items()}
    segments = None if mask.kv_segments is None else mask.kv_segments.astype(jnp.int32)
    ranges = []
    for sizes in (forward, backward):
        blocks = masks.visible_blocks(mask, T, S, sizes.q, sizes.k)
        ranges.append(jnp.broadcast_to(blocks, (B, *blocks.shape[1:])))
    keys = [jnp.stack(masks.key_block_range(blocks), -1) for blocks in ranges]
    return Context(floats, integers, segments, *keys, jnp.stack(masks.query_block_range(ranges[1]), -1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call, operands, context):
    return _forward(call, operands, context)[0]


def _forward(call, operands, context):
    q, k, v, c, power = operands
    rows = context.floats | {"c": c} | ({} if power is None else {"power": power})
    o, statistics = call.machine.forward(call, q, k, v, context, rows)
    return (o, statistics), (operands, context, o, statistics)


def _backward(call, residuals, cotangents):
    (q, k, v, c, power), context, o, statistics = residuals
    do = cotangents[0]  # the statistics have no gradient
    delta = (o.astype(c.dtype) * do.astype(c.dtype)).sum(-1).swapaxes(1, 2)
    rows = _gradient_rows(call.options, context.floats, c, power, statistics, delta)
    dq, dk, dv, drows = call.machine.backward(call, q, k, v, do, context, rows)
    return (dq, dk, dv, drows["c"], drows.get("power")), jax.tree.map(lambda x: None, context)


_attend.defvjp(_forward, _backward)


def _gradient_rows(options, floats, c, power, statistics, delta) -> Rows:
    """The row vectors of `tiles.gradients`, and the threshold's factor t where all weights of the row move it."""
    rows = {"c": c, "delta": delta}
    if options.biased or options.shifted:
        rows["bias"] = floats.get("bias", 0) - statistics["shift"]
    rows |= {"slope": floats["slope"]} if "slope" in floats else {}
    share = reciprocal(statistics["Z"]) if options.normalise == "l1" else floats["share"]
    if options.power is None:
        return rows | {"share": share}
    per_M, per_W = reciprocal(statistics["M"]), reciprocal(statistics["W"])
    p = options.power if power is None else power
    rows |= {"tau": statistics["tau"], "per_M": per_M, "per_W": per_W, "lift": p * per_M * per_W}
    rows |= {} if power is None else {"power": power}
    rows |= {"threshold": floats["threshold"]} if options.mean_threshold else {}
    return rows | ({"share": jnp.where(per_M > 0, 0, share)} if options.degenerate == "lssa" else {})


def pack(rows: Rows, length: int, fill: int = 0) -> tuple[tuple[str, ...], jax.Array]:
    """Row vectors [..., T] as their names and one array [..., R, length], filled up at the end."""
    names = tuple(sorted(rows))
    packed = jnp.stack([rows[name] for name in names], axis=-2)
    padding = [(0, 0)] * (packed.ndim - 1) + [(0, length - packed.shape[-1])]
    return names, jnp.pad(packed, padding, constant_values=fill)


def pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros at the end of an axis, up to a multiple."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding)


def most_blocks(count: int, block: int, other: int, window: int | None) -> int:
    """How many of `count` blocks of one axis a block of `other` on the other axis can need; less under a window."""
    return count if window is None else min(count, (other + window + block - 3) // block + 1)


def with_dtype(arguments: Arguments, dtype) -> Arguments:
    """The same call with q, k and v in another dtype."""
    q, k, v = (x.astype(dtype) for x in (arguments.q, arguments.k, arguments.v))
    return dataclasses.replace(arguments, q=q, k=k, v=v)
