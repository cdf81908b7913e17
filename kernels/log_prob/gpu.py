"""Log-probabilities on NVIDIA GPUs, Pallas through Triton: a forward kernel, and one for the gradient of the logits.

Forward: a program has R rows and a part of the vocabulary, and keeps their running statistics; parts are joined after.
Backward: the vocabulary passes in chunks. A kernel computes the chunk's logits again and writes their gradient dx,
N x chunk in the operands' dtype; two matrix products, dh += dx w and dw = dx^T h, are the compiler's own. To keep dh
and dw [., D] in registers beside dx, as on TPU, D would have to be tiny.

Letters: N rows, D hidden size, V vocabulary, padded with zeros to whole blocks; R rows, C tokens, E hidden channels of
a block, P parts.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.log_prob import statistics
from kernels.log_prob.arguments import (
    LOWEST,
    Arguments,
    Kernel,
    RowGradients,
    Shard,
    Statistics,
    logit_gradient,
)

PROGRAMS = 256  # about two for each of the processors of an A100 or H100
CHUNK = 2**25  # elements of dx in memory: 64 MiB in bfloat16


def kernel(interpret) -> Kernel:
    """The kernels, compiled, or simulated as `interpret` says."""
    return Kernel(partial(forward, interpret), partial(backward, interpret))


def why_unsupported(arguments: Arguments) -> str | None:
    """Why the kernels cannot run on these arguments, or None."""
    dtype, sizes = arguments.hidden.dtype, arguments.options.block_sizes
    if dtype == jnp.float64:
        return "it multiplies 16- and 32-bit floats, and hidden is float64; cast it, or use 'blockwise'"
    if sizes and any(size < 16 or size & (size - 1) for size in (sizes.rows, sizes.vocab)):
        return f"block sizes rows={sizes.rows}, vocab={sizes.vocab} must be powers of two from 16 on; change them"
    return None


def forward(interpret, shard: Shard) -> Statistics:
    """The statistics of all rows."""
    (N, D), V, options = shard.h.shape, shard.vocab, shard.options
    R, C, E = _sizes(shard)
    rows, tokens = math.ceil(N / R), math.ceil(V / C)
    parts = max(1, min(tokens, PROGRAMS // rows))
    loops = math.ceil(tokens / parts)
    h, w, labels = _operands(shard, R, C * loops * parts, E)
    row = pl.BlockSpec((None, R), lambda i, p: (p, i))
    kinds = [
        jnp.float32,
        jnp.float32,
        options.entropy and jnp.float32,
        jnp.float32,
        options.argmax and jnp.int32,
    ]
    out_shape = [jax.ShapeDtypeStruct((parts, len(h)), kind) for kind in kinds if kind]
    found = pl.pallas_call(
        partial(_forward_kernel, options, V, (R, C, E), loops),
        grid=(rows, parts),
        in_specs=[
            pl.BlockSpec((R, h.shape[1]), lambda i, p: (i, 0)),
            pl.BlockSpec(w.shape, lambda i, p: (0, 0)),
            pl.BlockSpec((R,), lambda i, p: (i,)),
        ],
        out_specs=[row] * len(out_shape),
        out_shape=out_shape,
        cost_estimate=pl.CostEstimate(
            flops=2 * N * V * D, transcendentals=N * V, bytes_accessed=h.nbytes * parts + w.nbytes * rows
        ),
        compiler_params=_parameters(shard, wide_stages=2),  # of three, registers spill
        interpret=interpret,
        name="log_prob_forward",
    )(h, w, labels)
    joined = statistics.merge_axis(_statistics(found, options))
    return jax.tree.map(lambda x: x[:N], joined)


def backward(interpret, shard: Shard, gradients: RowGradients) -> tuple[jax.Array, jax.Array]:
    """dh [N, D] and dw like w, float32."""
    (N, D), V, axis = shard.h.shape, shard.vocab, shard.options.vocab_axis
    R, C, E = _sizes(shard)
    size = C * min(math.ceil(V / C), max(1, CHUNK // (N * C)))
    h, w, labels = _operands(shard, R, size, E)
    rows = [_pad(x, 0, R) for x in gradients if x is not None]

    def chunk(dh, start):
        part = jax.lax.dynamic_slice_in_dim(w, start, size, axis)
        dx = _logit_gradients(interpret, shard, (R, C, E), h, part, labels - start, rows)
        dh += _product("nv,dv->nd" if axis else "nv,vd->nd", dx, part)
        return dh, _product("nv,nd->dv" if axis else "nv,nd->vd", dx, h)

    starts = jnp.arange(0, w.shape[axis], size, dtype=jnp.int32)
    dh, dw = jax.lax.scan(chunk, jnp.zeros(h.shape, jnp.float32), starts)
    dw = jnp.moveaxis(dw, 0, 1).reshape(w.shape) if axis else dw.reshape(w.shape)
    return dh[:N, :D], (dw[:D, :V] if axis else dw[:V, :D])


def _logit_gradients(interpret, shard, sizes, h, w, labels, rows):
    """dz [N, V] in h's dtype for a chunk w of the weight."""
    (R, C, _), options = sizes, shard.options
    N, V = h.shape[0], w.shape[options.vocab_axis]
    w_spec = (
        ((h.shape[1], C), lambda i, j: (0, j))
        if options.vocab_axis
        else ((C, h.shape[1]), lambda i, j: (j, 0))
    )
    row = pl.BlockSpec((R,), lambda i, j: (i,))
    return pl.pallas_call(
        partial(_gradient_kernel, options, sizes),
        grid=(N // R, V // C),
        in_specs=[
            pl.BlockSpec((R, h.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec(*w_spec),
            *[row] * (1 + len(rows)),
        ],
        out_specs=pl.BlockSpec((R, C), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((N, V), h.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * N * V * h.shape[1],
            transcendentals=N * V,
            bytes_accessed=h.nbytes + w.nbytes + N * V * h.dtype.itemsize,
        ),
        compiler_params=_parameters(shard, wide_stages=3),
        interpret=interpret,
        name="log_prob_gradient",
    )(h, w, labels, *rows)


def _forward_kernel(options, vocab, sizes, loops, h, w, labels, *out):
    R, C, _ = sizes
    first = pl.program_id(1) * loops * C
    of = labels[...][:, None]

    def block(n, found):
        start = first + n * C
        x = options.logits(_logits(options, sizes, h, w, start))
        token = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        x = jnp.where(token < vocab, x, LOWEST)
        y = jnp.sum(jnp.where(token == of, x, 0), axis=1)
        new = statistics.extend(_statistics(found, options), x, y, token, axis=1)
        return tuple(x for x in new if x is not None)

    empty = tuple(x for x in statistics.empty((R,), jnp.float32, options) if x is not None)
    for ref, x in zip(out, jax.lax.fori_loop(0, loops, block, empty), strict=True):
        ref[...] = x


def _gradient_kernel(options, sizes, h, w, labels, *refs):
    *rows, dz = refs
    x = options.logits(_logits(options, sizes, h, w, 0))
    token = pl.program_id(1) * sizes[1] + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    values = [ref[...][:, None] for ref in rows]
    of = RowGradients(*values, *(None,) * (4 - len(values)))
    dz[...] = (logit_gradient(x, token == labels[...][:, None], of) * options.slope(x)).astype(dz.dtype)


def _logits(options, sizes, h, w, start):
    """h w [R, C] in float32 for the tokens from `start` on, summed over blocks of channels."""
    R, C, E = sizes

    def channels(n, x):
        at = pl.ds(n * E, E)
        part = w[at, pl.ds(start, C)] if options.vocab_axis else w[pl.ds(start, C), at].T
        precision = jax.lax.Precision.HIGHEST if part.dtype == jnp.float32 else None
        return x + jnp.dot(h[:, at], part, precision=precision, preferred_element_type=jnp.float32)

    return jax.lax.fori_loop(0, h.shape[1] // E, channels, jnp.zeros((R, C), jnp.float32))


def _sizes(shard: Shard) -> tuple[int, int, int]:
    """R, C and E: 16-bit tiles feed the tensor cores; float32 is exact, on the ordinary units, and smaller."""
    narrow, given = shard.h.dtype.itemsize == 2, shard.options.block_sizes
    R, C, E = (128, 128, 64) if narrow else (64, 64, 32)
    if given:
        return given.rows, given.vocab, E
    return min(R, max(16, 1 << (shard.h.shape[0] - 1).bit_length())), C, E


def _parameters(shard: Shard, wide_stages: int):
    narrow = shard.h.dtype.itemsize == 2
    return plgpu.CompilerParams(num_warps=8 if narrow else 4, num_stages=3 if narrow else wide_stages)


def _operands(shard: Shard, rows: int, tokens: int, channels: int):
    """h, w and labels, padded to multiples."""
    axis = shard.options.vocab_axis
    w = _pad(_pad(shard.w, axis, tokens), 1 - axis, channels)
    return _pad(_pad(shard.h, 0, rows), 1, channels), w, _pad(shard.labels, 0, rows, -1)


def _pad(x, axis: int, multiple: int, fill=0):
    if x.shape[axis] % multiple == 0:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding, constant_values=fill)


def _statistics(values, options) -> Statistics:
    """From the arrays there are, in order."""
    m, s, *rest = values
    u = rest.pop(0) if options.entropy else None
    return Statistics(m, s, u, *rest, *(() if options.argmax else (None,)))


def _product(equation, a, b):
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
