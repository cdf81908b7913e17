"""Log-probabilities on TPU: one forward kernel and two backward ones, for dh and dw, each computing its logits again.

Grids: forward and dh (row block, vocabulary block), dw (vocabulary block, row block); the second is the loop during
which outputs stay in VMEM. Where a kernel reduces over tokens or writes dw its logits are [C, R], tokens along the
sublanes: sums over tokens are then plain additions of registers, and what belongs to rows lies along the lanes.

Letters: N rows, D hidden size, V vocabulary, both padded with zeros to whole blocks of R rows and C tokens; w is
[V, D] here.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.log_prob import statistics
from kernels.log_prob.arguments import (
    LOWEST,
    Arguments,
    Kernel,
    Options,
    RowGradients,
    Shard,
    Statistics,
    logit_gradient,
)

LANES = 128
# Of the side that stays and of the side that passes by, in order of preference: the longer the one that stays, the less
# often the other is read from HBM.
SIZES = ((1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128))
DEFAULT_VMEM = 14 * 2**20  # of the compiler's default of 16 MiB, where the rest is its own
LARGEST_VMEM = 36 * 2**20  # asked for where hidden states are long


def kernel(interpret) -> Kernel:
    """The kernels, compiled, or simulated as `interpret` says."""
    return Kernel(partial(forward, interpret), partial(backward, interpret))


def why_unsupported(arguments: Arguments) -> str | None:
    """Why the kernels cannot run on these arguments, or None."""
    dtype, sizes, D = arguments.hidden.dtype, arguments.options.block_sizes, arguments.hidden.shape[-1]
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it multiplies bfloat16 and float32, and hidden is {dtype}; cast it, or use 'blockwise'"
    if sizes and (sizes.rows % LANES or sizes.vocab % LANES):
        return f"block sizes rows={sizes.rows}, vocab={sizes.vocab} must be multiples of {LANES}; change or drop them"
    R, C = (sizes.rows, sizes.vocab) if sizes else SIZES[-1]
    need = max(vmem(R, C, D, dtype), vmem(C, R, D, dtype))
    if need > LARGEST_VMEM:
        return (
            f"blocks of {R} rows and {C} tokens with {D=} in {dtype} take {need / 2**20:.0f} MiB of VMEM, more than "
            f"{LARGEST_VMEM / 2**20:.0f}; use smaller block_sizes, or 'blockwise'"
        )
    return None


def vmem(stays: int, passes: int, D: int, dtype) -> int:
    """Bytes of a backward kernel's blocks: operands twice (one being fetched), the sum twice, five blocks of logits.

    float32 operands also exist as the three bfloat16 parts that the matrix unit multiplies.
    """
    size = jnp.dtype(dtype).itemsize
    parts = 0 if size == 2 else 6
    return D * ((2 * size + parts) * (stays + passes) + 2 * 4 * stays) + 5 * 4 * stays * passes


def forward(interpret, shard: Shard) -> Statistics:
    """The statistics of all rows."""
    plan, options = Plan.make(shard, interpret, rows_first=True), shard.options
    h, w, labels = plan.operands(shard)
    kinds = [
        jnp.float32,
        jnp.float32,
        options.entropy and jnp.float32,
        jnp.float32,
        options.argmax and jnp.int32,
    ]
    out = [jax.ShapeDtypeStruct((1, plan.N), kind) for kind in kinds if kind]
    body = partial(_forward_kernel, plan)
    found = plan.call(
        body, "log_prob_forward", [h, w, labels[None]], ["h", "w", "row"], out, ["row"] * len(out), 1
    )
    return _statistics([x[0, : shard.h.shape[0]] for x in found], options)


def backward(interpret, shard: Shard, gradients: RowGradients) -> tuple[jax.Array, jax.Array]:
    """dh [N, D] and dw like w, float32."""
    N, given = shard.h.shape[0], [x for x in gradients if x is not None]

    plan = Plan.make(shard, interpret, rows_first=True)
    h, w, labels = plan.operands(shard)
    columns = jnp.stack([_pad(x, plan.R) for x in given], axis=1)
    out = jax.ShapeDtypeStruct(h.shape, jnp.float32)
    body, operands = partial(_dh_kernel, plan), [h, w, labels[:, None], columns]
    (dh,) = plan.call(body, "log_prob_dh", operands, ["h", "w", "column", "column"], [out], ["h"], 2)

    plan = Plan.make(shard, interpret, rows_first=False)
    h, w, labels = plan.operands(shard)
    operands = [h, w, labels[None], *(_pad(x, plan.R)[None] for x in given)]
    kinds = ["h", "w"] + ["row"] * (len(operands) - 2)
    out = jax.ShapeDtypeStruct(w.shape, jnp.float32)
    (dw,) = plan.call(partial(_dw_kernel, plan), "log_prob_dw", operands, kinds, [out], ["w"], 2)
    dw = dw[: shard.vocab]
    return dh[:N], dw if shard.options.vocab_axis == 0 else dw.T


def _forward_kernel(plan, h, w, labels, *out):
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        _write(out, statistics.empty((1, plan.R), jnp.float32, plan.options))

    def block(masked):
        x = plan.options.logits(_dot(w[...], h[...], 1))  # [C, R]
        token = j * plan.C + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        if masked:
            x = jnp.where(token < plan.vocab, x, LOWEST)
        y = jnp.sum(jnp.where(token == labels[...], x, 0), axis=0, keepdims=True)
        old = _statistics([ref[...] for ref in out], plan.options)
        _write(out, statistics.extend(old, x, y, token, axis=0, keepdims=True))

    if plan.vocab == plan.V:
        block(False)
    else:  # tokens that do not exist are in the last block only
        last = plan.V // plan.C - 1
        pl.when(j < last)(partial(block, False))
        pl.when(j == last)(partial(block, True))


def _dh_kernel(plan, h, w, labels, columns, dh):
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        dh[...] = jnp.zeros_like(dh)

    x = plan.options.logits(_dot(h[...], w[...], 1))  # [R, C]
    token = j * plan.C + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    rows = _row_gradients([columns[:, n : n + 1] for n in range(columns.shape[1])])
    dx = logit_gradient(x, token == labels[...], rows) * plan.options.slope(x)
    dh[...] += _dot(dx.astype(w.dtype), w[...], 0)  # tokens that do not exist have w = 0


def _dw_kernel(plan, h, w, labels, *refs):
    j, i, (*rows, dw) = pl.program_id(0), pl.program_id(1), refs

    @pl.when(i == 0)
    def _():
        dw[...] = jnp.zeros_like(dw)

    x = plan.options.logits(_dot(w[...], h[...], 1))  # [C, R]
    token = j * plan.C + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    dx = logit_gradient(x, token == labels[...], _row_gradients([ref[...] for ref in rows]))
    dw[...] += _dot((dx * plan.options.slope(x)).astype(h.dtype), h[...], 0)  # rows of padding have h = 0


@dataclass(frozen=True)
class Plan:
    """How a kernel cuts N rows and V tokens (padded; `vocab` of them exist) of hidden size D into blocks.

    rows_first: the grid is (row block, vocabulary block), so that rows stay; otherwise the converse.
    """

    N: int
    V: int
    D: int
    R: int
    C: int
    vocab: int
    options: Options
    rows_first: bool
    need: int
    interpret: Any

    @classmethod
    def make(cls, shard: Shard, interpret, rows_first: bool) -> "Plan":
        (N, D), V, sizes = shard.h.shape, shard.vocab, shard.options.block_sizes
        given = (
            [(sizes.rows, sizes.vocab)]
            if sizes and rows_first
            else [(sizes.vocab, sizes.rows)]
            if sizes
            else SIZES
        )
        long, short = (N, V) if rows_first else (V, N)
        fitted = [(_even(long, a), _even(short, b)) for a, b in given]
        needs = [vmem(a, b, D, shard.h.dtype) for a, b in fitted]
        best = next((n for n, need in enumerate(needs) if need <= DEFAULT_VMEM), None)
        if best is None or fitted[best][0] < min(
            512, fitted[0][0]
        ):  # then the matrix unit would wait for HBM
            best = next(n for n, need in enumerate(needs) if need <= LARGEST_VMEM)
        R, C = fitted[best] if rows_first else fitted[best][::-1]
        return cls(N + -N % R, V + -V % C, D, R, C, V, shard.options, rows_first, needs[best], interpret)

    def operands(self, shard: Shard):
        """h [N, D], w [V, D] and labels [N], padded."""
        w = shard.w if self.options.vocab_axis == 0 else shard.w.T
        return _pad(shard.h, self.R), _pad(w, self.C), _pad(shard.labels, self.R, -1)

    def call(self, body, name, operands, kinds, out_shape, out_kinds, products):
        """A `pallas_call`; kinds: "h" [N, D], "w" [V, D], "row" [1, N] and "column" [N, any]."""
        rows, tokens = self.N // self.R, self.V // self.C

        def row_block(a, b):
            return a if self.rows_first else b

        def spec(kind, x):
            if kind == "w":
                return pl.BlockSpec((self.C, self.D), lambda a, b: (b if self.rows_first else a, 0))
            if kind == "row":
                return pl.BlockSpec((1, self.R), lambda a, b: (0, row_block(a, b)))
            return pl.BlockSpec((self.R, x.shape[1]), lambda a, b: (row_block(a, b), 0))

        h, w = operands[:2]
        read = h.nbytes + w.nbytes * rows if self.rows_first else h.nbytes * tokens + w.nbytes
        cost = pl.CostEstimate(
            flops=2 * products * self.N * self.V * self.D,
            transcendentals=self.N * self.V,
            bytes_accessed=read + sum(x.size * 4 for x in out_shape),
        )
        return pl.pallas_call(
            body,
            grid=(rows, tokens) if self.rows_first else (tokens, rows),
            in_specs=[spec(*pair) for pair in zip(kinds, operands, strict=True)],
            out_specs=[spec(*pair) for pair in zip(out_kinds, out_shape, strict=True)],
            out_shape=out_shape,
            cost_estimate=cost,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=None if self.need <= DEFAULT_VMEM else self.need * 5 // 4,
            ),
            interpret=self.interpret,
            name=name,
        )(*operands)


def _dot(a, b, contracted: int):
    """a [M, K] with b, whose axis `contracted` is K, in float32."""
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    dimensions = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _statistics(values, options: Options) -> Statistics:
    """From the arrays there are, in order."""
    m, s, *rest = values
    u = rest.pop(0) if options.entropy else None
    return Statistics(m, s, u, *rest, *(() if options.argmax else (None,)))


def _write(refs, values: Statistics) -> None:
    for ref, x in zip(refs, [x for x in values if x is not None], strict=True):
        ref[...] = x


def _row_gradients(values) -> RowGradients:
    return RowGradients(*values, *(None,) * (4 - len(values)))


def _even(length: int, target: int) -> int:
    """A multiple of LANES that cuts `length` into ceil(length / target) nearly equal blocks."""
    blocks = -(-length // target)
    return LANES * -(-length // (LANES * blocks))


def _pad(x, multiple: int, fill=0):
    """Axis 0 filled up to a multiple."""
    padding = ((0, -x.shape[0] % multiple), *((0, 0),) * (x.ndim - 1))
    return jnp.pad(x, padding, constant_values=fill) if padding[0][1] else x
