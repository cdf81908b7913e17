"""Linear attention on TPU, forward: a causal sweep over chunks that carries the state in VMEM.

Letters: B batch, L positions, N chunks of C, K key/value heads, J grid steps over heads, G query heads of each, D
channels of q and k, E of v; P parts of the state Z [P, D, E], real and with an angle imaginary; z [P, D] the state of
the denominator, whose "values" are ones. Per chunk, with w the weights of pairs (`tpu_chunk.py`):

    n_a  = sum_b w_ab (q_a . k_b) v_b + Re(e^{i angle a} Z)^T q_a                 with decays: q, n lose what `at` says
    Z   <- e^{i angle C} Z + sum_b e^{i angle (C - b)} k_b v_b^T                              Z `through`, k, v `to_end`
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import tiles
from kernels.linear import tpu_chunk as chunk
from kernels.linear.tpu_chunk import Loss, Plan
from kernels.linear.tpu_specs import Specs


def forward(plan: Plan, operands: dict, constants: dict, save_states: bool):
    """operands, constants: see `tpu_specs`. Returns a dict: num [B, J, G, L, E], den [B, J, N, G, C], the state after L
    positions, end [B, J, P, D, E] and end_ones [B, J, P, D]; with save_states also those at the chunks' starts."""
    specs = Specs(plan, operands, constants)
    outputs = ["num", "end"] + ["den", "end_ones"] * plan.denominator
    if save_states:
        outputs += ["starts"] + ["starts_ones"] * plan.denominator
    inputs = [name for name in (*operands, *constants) if name != "bounds"]
    body = partial(_kernel, plan, (*inputs, *outputs, *specs.scratch_names))
    results = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=specs.grid,
            in_specs=[specs.block(name) for name in inputs],
            out_specs=[specs.block(name) for name in outputs],
            scratch_shapes=specs.scratch,
        ),
        out_shape=[specs.shape(name) for name in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=specs.cost(inputs, outputs, sweeps=1),
        interpret=plan.interpret,
        name="linear_forward",
    )(constants["bounds"], *(operands[n] if n in operands else constants[n] for n in inputs))
    return dict(zip(outputs, results, strict=True))


def _kernel(plan, names, bounds, *refs):
    refs = dict(zip(names, refs, strict=True))
    b, n = pl.program_id(0), pl.program_id(2)
    Z, z = refs["Z"], refs.get("z")

    @pl.when(n == 0)
    def _():
        Z[...] = refs["state"][0, 0]
        if z is not None:
            z[...] = refs["ones"][0, 0]

    if "starts" in refs:
        refs["starts"][0, 0, 0] = Z[...]
        if z is not None:
            refs["starts_ones"][0, 0, 0] = z[...]
    x = Chunk(plan, refs, bounds[b, n], bounds[b, n + 1])
    num, _ = chunk.weighted(x.pairs, x.scores, x.v, x.of_values)
    phased = x.queries()
    read = sum(
        tiles.product(chunk.flat(q.astype(x.v.dtype)), Z[p].astype(x.v.dtype)) for p, q in enumerate(phased)
    )
    read = chunk.by_heads(read, plan.heads)
    refs["num"][0, 0] = num + (read if x.of_values is None else read * x.of_values.at)
    if z is not None:
        den = x.scores.sum(2, keepdims=True)
        den = den + sum((q * z[p : p + 1]).sum(2, keepdims=True) for p, q in enumerate(phased))
        for g in range(plan.heads):
            wide = jnp.broadcast_to(den[g], (plan.chunk, tiles.LANES))
            refs["den"][0, 0, 0, g : g + 1] = tiles.as_row(wide)
    keys, v = x.keys(), x.values()
    passed, passed_ones = x.passed(Z[...], None if z is None else z[...])
    for p, k in enumerate(keys):
        Z[p] = passed[p] + chunk.over_rows(k.astype(x.v.dtype), v.astype(x.v.dtype))
        if z is not None:
            z[p : p + 1] = passed_ones[p] + k.sum(0, keepdims=True)

    @pl.when(n == plan.chunks - 1)
    def _():
        refs["end"][0, 0] = Z[...]
        if z is not None:
            refs["end_ones"][0, 0] = z[...]


class Chunk:
    """A chunk's operands, the scores of its pairs, and how it meets the state; used by both directions."""

    def __init__(self, plan: Plan, refs: dict, current: jax.Array, last: jax.Array):
        """current, last: the run the state at the start belongs to, and the one at the end."""
        self.plan, self.refs, self.kept = plan, refs, current == last
        self.current, self.last = current, last
        self.q, self.k, self.v = refs["q"][0, 0], refs["k"][0, 0], refs["v"][0, 0]
        self.runs = tiles.as_columns(refs["runs"][0, 0])[0] if plan.documents else None
        self.of_keys: Loss | None = None
        self.of_values: Loss | None = None
        if plan.number:
            self.of_keys = chunk.of_number(refs["key_decay"][0, 0, 0])
        elif plan.keys:
            self.of_keys = chunk.of_channels(refs["key_decay"][0, 0])
        if plan.values:
            self.of_values = chunk.of_channels(refs["value_decay"][0, 0])
        self.pairs = chunk.make_pairs(plan, refs, self.runs)
        self.scores = chunk.scores(self.pairs, self.q, self.k, self.of_keys) * self.pairs.weights

    def queries(self) -> list[jax.Array]:
        """What reads each part of the state, float32 [G, C, D]: zero in rows of other documents."""
        q = self.from_current(self.q.astype(jnp.float32))
        q = q if self.of_keys is None else q * self.of_keys.at
        return [q] if self.plan.parts == 1 else [q * self.phase(0), -q * self.phase(1)]

    def keys(self) -> list[jax.Array]:
        """What enters each part of the state, float32 [C, D]: zero at keys of documents that have ended."""
        k = self.of_last(self.k.astype(jnp.float32))
        k = k if self.of_keys is None else k * self.of_keys.to_end
        return [k] if self.plan.parts == 1 else [k * self.phase(2), k * self.phase(3)]

    def values(self) -> jax.Array:
        v = self.v.astype(jnp.float32)
        return v if self.of_values is None else v * self.of_values.to_end

    def passed(self, Z: jax.Array, z: jax.Array | None, back: bool = False):
        """Lists of the parts of Z [P, D, E] and z [P, D] behind the chunk; back: of gradients, in front of it."""
        parts = [Z[p] for p in range(self.plan.parts)]
        ones = None if z is None else [z[p : p + 1] for p in range(self.plan.parts)]
        parts, ones = (None if x is None else self._turned(x, back) for x in (parts, ones))
        if self.of_keys is not None:
            of_rows = self.of_keys.through
            if self.plan.keys:
                of_rows = tiles.widen(tiles.as_columns(of_rows)[0], Z.shape[2])
            parts = [x * of_rows for x in parts]
            ones = None if ones is None else [x * self.of_keys.through for x in ones]
        if self.of_values is not None:
            parts = [x * self.of_values.through for x in parts]
        if self.plan.documents:
            parts = [jnp.where(self.kept, x, 0.0) for x in parts]
            ones = None if ones is None else [jnp.where(self.kept, x, 0.0) for x in ones]
        return parts, ones

    def phase(self, which: int) -> jax.Array:
        """[C, 1]: cosine and sine of angle a (0, 1) and of angle (C - b) (2, 3)."""
        return self.refs["phases"][0, which]

    def from_current(self, x: jax.Array) -> jax.Array:
        """x [.., C, D] with zeros in rows that do not read the state."""
        return x if self.runs is None else jnp.where(self.runs[:, :1] == self.current, x, 0.0)

    def of_last(self, x: jax.Array) -> jax.Array:
        """x [C, D] with zeros at keys that do not enter the state."""
        return x if self.runs is None else jnp.where(self.runs[:, :1] == self.last, x, 0.0)

    def _turned(self, parts, back):
        if self.plan.parts == 1:
            return parts
        cos, sin = (self.refs["turn"][0, n : n + 1] for n in (0, 1))
        sin = -sin if back else sin
        return [cos * parts[0] - sin * parts[1], sin * parts[0] + cos * parts[1]]
