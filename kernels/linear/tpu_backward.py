"""Linear attention on TPU, backward: one sweep over chunks from the last to the first, with the states saved at their
starts.

Letters as in `tpu_forward.py`; F is the gradient of n, f that of the denominator, Y [P, D, E] and y [P, D] those of the
state behind a chunk, w the weights of pairs:

    dA_ab = F_a . v_b + f_a                                                        with decays of values inside
    dq_a  = sum_b w_ab dA_ab k_b + Re(e^{i angle a} Z) F_a
    dk_b  = sum_a w_ab dA_ab q_a + Re(e^{-i angle (C - b)} Y) v_b
    dv_b  = sum_a w_ab (q_a . k_b) F_a + Re(e^{-i angle (C - b)} Y)^T k_b
    Y    <- e^{-i angle C} Y + sum_a e^{-i angle a} q_a F_a^T

A decay at l acts on the pairs b < l <= a, on what rows a >= l read, on what keys b < l leave and on what passes; its
gradient is the sum of just these, so nothing cancels.
"""

from functools import partial

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import tiles
from kernels.linear import tpu_chunk as chunk
from kernels.linear.tpu_chunk import Plan
from kernels.linear.tpu_forward import Chunk
from kernels.linear.tpu_specs import Specs


def backward(plan: Plan, operands: dict, constants: dict, cotangents: dict) -> dict:
    """cotangents: starts and starts_ones as `forward` saved them; dnum, dden, dend, dend_ones shaped like its results.

    Returns gradients "d" + name of the operands, those of key/value heads and states one a grid step over heads.
    """
    specs = Specs(plan, operands | cotangents, constants, backward=True)
    ones = plan.denominator
    outputs = ["dq", "dk", "dv", "dstate"] + ["dones"] * ones
    outputs += ["dkey_decay"] * (plan.number or plan.keys) + ["dvalue_decay"] * plan.values
    operands = {n: x for n, x in operands.items() if n not in ("state", "ones")}
    inputs = [name for name in (*operands, *constants, *cotangents) if name != "bounds"]
    arrays = operands | constants | cotangents
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
        cost_estimate=specs.cost(inputs, outputs, sweeps=3),
        interpret=plan.interpret,
        name="linear_backward",
    )(constants["bounds"], *(arrays[n] for n in inputs))
    return dict(zip(outputs, results, strict=True))


def _kernel(plan, names, bounds, *refs):
    refs = dict(zip(names, refs, strict=True))
    b, step = pl.program_id(0), pl.program_id(2)
    n = plan.chunks - 1 - step
    Y, y = refs["Z"], refs.get("z")

    @pl.when(step == 0)
    def _():
        Y[...] = refs["dend"][0, 0]
        if y is not None:
            y[...] = refs["dend_ones"][0, 0]

    x = Chunk(plan, refs, bounds[b, n], bounds[b, n + 1])
    Z, z = refs["starts"][0, 0, 0], None if y is None else refs["starts_ones"][0, 0, 0]
    F, f = refs["dnum"][0, 0], None if y is None else _columns(refs["dden"][0, 0, 0])
    of_pairs, of_state, of_rest = _pairs(x, F, f), _state_read(x, F, f, Z, z), _state_left(x, Y, y)
    refs["dq"][0, 0] = (of_pairs["q"] + of_state["q"]).astype(refs["dq"].dtype)
    refs["dk"][0, 0] = (of_pairs["k"] + of_rest["k"]).astype(refs["dk"].dtype)
    refs["dv"][0, 0] = (of_pairs["v"] + of_rest["v"]).astype(refs["dv"].dtype)
    passing, passing_ones = x.passed(Z, z)
    through = [past * Y[p] for p, past in enumerate(passing)]
    through_ones = [] if y is None else [past * y[p : p + 1] for p, past in enumerate(passing_ones)]
    if plan.number:
        refs["dkey_decay"][0, 0, 0] = _of_number(plan, of_pairs, of_state, of_rest, through, through_ones)
    if plan.keys:
        lost = sum(_as_row(each.sum(1, keepdims=True)) for each in through) + sum(through_ones)
        rows, keys = of_state["keys"].sum(0), of_rest["keys"]
        refs["dkey_decay"][0, 0] = chunk.channels_gradient(rows, keys, of_pairs["key_levels"]) + lost
    if plan.values:
        lost = sum(each.sum(0, keepdims=True) for each in through)
        rows, keys = of_state["values"].sum(0), of_rest["values"]
        refs["dvalue_decay"][0, 0] = chunk.channels_gradient(rows, keys, of_pairs["value_levels"]) + lost
    before, before_ones = x.passed(Y[...], None if y is None else y[...], back=True)
    for p, q in enumerate(of_state["phased"]):
        Y[p] = before[p] + chunk.over_rows(chunk.flat(q.astype(x.v.dtype)), chunk.flat(of_state["F"]))
        if y is not None:
            y[p : p + 1] = before_ones[p] + (q * f).sum(0).sum(0, keepdims=True)

    @pl.when(step == plan.chunks - 1)
    def _():
        refs["dstate"][0, 0] = Y[...]
        if y is not None:
            refs["dones"][0, 0] = y[...]


def _pairs(x, F, f):
    """Gradients by way of the chunk's own pairs; levels: q . dq + k . dk and F . n + v . dv of each level, [C, X]."""
    dA = chunk.scores(x.pairs, F, x.v, x.of_values)
    dA = dA if f is None else dA + f
    dS = dA * x.pairs.weights
    dq, rows = chunk.weighted(x.pairs, dS, x.k, x.of_keys)
    dk, keys = chunk.weighted_back(x.pairs, dS, x.q, x.of_keys)
    dv, left = chunk.weighted_back(x.pairs, x.scores, F, x.of_values)
    found = {"q": dq, "k": dk, "v": dv, "pairs": (dA * x.scores).sum(0) if x.plan.number else None}
    q, k, v, F = (y.astype(jnp.float32) for y in (x.q, x.k, x.v, F))
    found["key_levels"] = [(q * row).sum(0) + k * key for row, key in zip(rows, keys, strict=True)]
    if x.plan.values:
        read = chunk.weighted(x.pairs, x.scores, x.v, x.of_values)[1]
        found["value_levels"] = [(F * row).sum(0) + v * key for row, key in zip(read, left, strict=True)]
    return found


def _state_read(x, F, f, Z, z):
    """Gradients by way of what rows read from the state; keys, values: q . dq and F . n, [G, C, X]."""
    F = F if x.of_values is None else chunk.scaled(F, x.of_values.at)
    phased, dtype = x.queries(), x.v.dtype
    parts = []
    for p in range(x.plan.parts):
        d = chunk.by_heads(tiles.product_transposed(chunk.flat(F), Z[p].astype(dtype)), x.plan.heads)
        parts.append(d if f is None else d + f * z[p : p + 1])
    d = parts[0] if x.plan.parts == 1 else x.phase(0) * parts[0] - x.phase(1) * parts[1]
    d = x.from_current(d)
    found = {"phased": phased, "F": F, "q": d}
    if x.of_keys is not None:
        found["q"] = d * x.of_keys.at
        found["keys"] = x.q.astype(jnp.float32) * found["q"]
    if x.of_values is not None:
        read = sum(
            tiles.product(chunk.flat(q.astype(dtype)), Z[p].astype(dtype)) for p, q in enumerate(phased)
        )
        found["values"] = F.astype(jnp.float32) * chunk.by_heads(read, x.plan.heads)
    return found


def _state_left(x, Y, y):
    """Gradients by way of what keys leave in the state; keys, values: k . dk and v . dv, [C, X]."""
    keys, v, dtype = x.keys(), x.values(), x.v.dtype
    dk, dv = [], 0.0
    for p, k in enumerate(keys):
        of_part = Y[p].astype(dtype)
        d = tiles.product_transposed(v.astype(dtype), of_part)
        dk.append(d if y is None else d + y[p : p + 1])
        dv = dv + tiles.product(k.astype(dtype), of_part)
    d = dk[0] if x.plan.parts == 1 else x.phase(2) * dk[0] + x.phase(3) * dk[1]
    found = {"k": x.of_last(d), "v": dv}
    if x.of_keys is not None:
        found["k"] = found["k"] * x.of_keys.to_end
        found["keys"] = x.k.astype(jnp.float32) * found["k"]
    if x.of_values is not None:
        found["v"] = dv * x.of_values.to_end
        found["values"] = x.v.astype(jnp.float32) * found["v"]
    return found


def _of_number(plan, of_pairs, of_state, of_rest, through, through_ones):
    """Gradient of a decay of one number, a row [1, C]."""
    a, l = chunk.grid_of(plan.chunk)
    older = tiles.product(of_pairs["pairs"], (a < l).astype(jnp.float32))  # [a, l]: sums over b < l
    later = jnp.where(a >= l, older + of_state["keys"].sum(0).sum(1, keepdims=True), 0.0)
    left = jnp.where(a < l, of_rest["keys"].sum(1, keepdims=True), 0.0)
    passed = sum(each.sum(0, keepdims=True).sum(1, keepdims=True) for each in (*through, *through_ones))
    return later.sum(0, keepdims=True) + left.sum(0, keepdims=True) + passed


def _columns(rows):
    """[G, C] -> [G, C, 1]."""
    return jnp.stack([column[:, :1] for column in tiles.as_columns(rows)])


def _as_row(column):
    """[D, 1] -> [1, D]."""
    return tiles.as_row(jnp.broadcast_to(column, (column.shape[0], tiles.LANES)))
