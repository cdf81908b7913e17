"""One gradient for all kernels, and where they meet the mesh: every device has its rows and its part of the vocabulary.

Forward: statistics of the local tokens are joined by maxima and sums over "tensor"; N numbers travel, never logits.
Backward: each device needs only lse and H of its rows. dh is summed over "tensor"; dw over the axes that split rows,
and where "fsdp" divides D each device receives its own part of that sum (as parameters are cut up), not the whole.

    hidden  [B, T, D]: B over "data" and "fsdp", T over "sequence"          labels [B, T] likewise
    weight  [D, V] or [V, D]: V over "tensor", D gathered from "fsdp" in hidden's dtype

An axis that does not divide its dimension is not used for it: every device along it then computes the same.
Letters: B batch, T length, N = B T rows, D hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from kernels.dispatch import BATCH_AXES, HEAD_AXIS
from kernels.log_prob import statistics
from kernels.log_prob.arguments import Arguments, Kernel, Options, Outputs, RowGradients, Shard

TIME_AXIS, PARAMETER_AXIS = "sequence", "fsdp"


def run(kernel: Kernel, arguments: Arguments) -> Outputs:
    """The outputs by a kernel, on one device or on the mesh that is set."""
    return _run(kernel, arguments.options, arguments.hidden, arguments.weight, arguments.labels)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(kernel, options, hidden, weight, labels):
    return _forward(kernel, options, hidden, weight, labels)[0]


def _forward(kernel: Kernel, options: Options, hidden, weight, labels):
    place = Place.find(hidden, weight, options)

    def local(h, w, labels):
        shard = Shard(
            h.reshape(-1, h.shape[-1]), w, place.local_labels(labels, w, options).reshape(-1), options
        )
        found = kernel.forward(shard)
        if place.vocab:
            found = _join(found, place.vocab, shard.vocab)
        return jax.tree.map(lambda x: x.reshape(h.shape[:2]), (*statistics.finish(found), found.index))

    rows = place.row_spec
    outputs = (rows, rows, rows if options.entropy else None, rows if options.argmax else None)
    inputs = (rows, place.weight_spec(options), rows)
    narrow = weight.astype(hidden.dtype)
    logp, lse, entropy, argmax = place.map(local, inputs, outputs)(hidden, narrow, labels)
    return Outputs(logp, lse, entropy, argmax), (hidden, weight, labels, lse, entropy)


def _backward(kernel: Kernel, options: Options, residuals, cotangents):
    hidden, weight, labels, lse, entropy = residuals
    place = Place.find(hidden, weight, options)
    mass, of_entropy = cotangents.lse - cotangents.logp, None
    if options.entropy:
        of_entropy = cotangents.entropy
        mass -= of_entropy * entropy

    def local(h, w, labels, rows):
        rows = jax.tree.map(lambda x: x.reshape(-1), rows)
        shard = Shard(
            h.reshape(-1, h.shape[-1]), w, place.local_labels(labels, w, options).reshape(-1), options
        )
        dh, dw = kernel.backward(shard, rows)
        if place.vocab:
            dh = jax.lax.psum(dh, place.vocab)
        return dh.reshape(h.shape).astype(hidden.dtype), place.sum_rows(dw, options).astype(weight.dtype)

    rows = place.row_spec
    gradients = RowGradients(lse, cotangents.logp, mass, of_entropy)
    inputs = (rows, place.weight_spec(options), rows, jax.tree.map(lambda _: rows, gradients))
    outputs = (rows, place.weight_spec(options, place.parameter_axis))
    dh, dw = place.map(local, inputs, outputs)(hidden, weight.astype(hidden.dtype), labels, gradients)
    return place.like(dh, hidden), place.like(dw, weight), None


_run.defvjp(_forward, _backward)


def _join(found, axis: str, size: int):
    if found.index is not None:
        found = found._replace(index=found.index + size * jax.lax.axis_index(axis))
    total, largest, lowest = (partial(f, axis_name=axis) for f in (jax.lax.psum, jax.lax.pmax, jax.lax.pmin))
    return statistics.merge(found, total, largest, lowest)


@dataclass(frozen=True)
class Place:
    """The mesh axes in use: of the batch, the length and the vocabulary, and the one that dw is scattered over."""

    free: tuple[str, ...] = ()
    explicit: bool = False
    batch: tuple[str, ...] = ()
    time: str | None = None
    vocab: str | None = None
    parameter_axis: str | None = None

    @classmethod
    def find(cls, hidden, weight, options: Options) -> "Place":
        """The axes of the mesh that is set, but those that an outer shard_map has made manual."""
        mesh = jax.sharding.get_abstract_mesh()
        kinds = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        free = {name: mesh.shape[name] for name, kind in kinds.items() if kind != AxisType.Manual}
        if math.prod(free.values()) == 1:
            return cls()
        (B, T, D), V, batch, share = hidden.shape, weight.shape[options.vocab_axis], [], 1
        for name in BATCH_AXES:
            if name in free and B % (share * free[name]) == 0:
                batch.append(name)
                share *= free[name]

        def dividing(name, size):
            return name if free.get(name, 1) > 1 and size % free[name] == 0 else None

        scatter = dividing(PARAMETER_AXIS, D) if PARAMETER_AXIS in batch else None
        explicit = all(kinds[name] == AxisType.Explicit for name in free)
        return cls(
            tuple(free), explicit, tuple(batch), dividing(TIME_AXIS, T), dividing(HEAD_AXIS, V), scatter
        )

    @property
    def row_spec(self) -> PartitionSpec:
        return PartitionSpec(self.batch or None, self.time)

    def weight_spec(self, options: Options, hidden_axis: str | None = None) -> PartitionSpec:
        return PartitionSpec(
            *((self.vocab, hidden_axis) if options.vocab_axis == 0 else (hidden_axis, self.vocab))
        )

    def map(self, local, inputs, outputs):
        """`local` on every device's share; as it is without a mesh."""
        if not self.free:
            return local
        mapped = jax.shard_map(
            local, in_specs=inputs, out_specs=outputs, axis_names=set(self.free), check_vma=False
        )
        if not self.explicit:
            return mapped
        return lambda *operands: mapped(*jax.tree.map(jax.reshard, operands, inputs))

    def like(self, gradient, operand):
        """On meshes that refuse to move arrays by themselves: the gradient where its operand lies."""
        return jax.reshard(gradient, jax.typeof(operand).sharding.spec) if self.explicit else gradient

    def local_labels(self, labels, w, options: Options):
        """Labels counted from the first token of this device, -1 where they are elsewhere, so that padding has none."""
        V = w.shape[options.vocab_axis]
        local = labels - (0 if self.vocab is None else V * jax.lax.axis_index(self.vocab))
        return jnp.where((local >= 0) & (local < V), local, -1)

    def sum_rows(self, dw, options: Options):
        """The sum of dw over the devices that have other rows."""
        others = tuple(a for a in (*self.batch, self.time) if a and a != self.parameter_axis)
        dw = jax.lax.psum(dw, others) if others else dw
        if self.parameter_axis is None:
            return dw
        return jax.lax.psum_scatter(
            dw, self.parameter_axis, scatter_dimension=1 - options.vocab_axis, tiled=True
        )
