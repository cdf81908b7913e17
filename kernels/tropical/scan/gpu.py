"""The max-plus scan as a GPU kernel (Pallas-Triton): a warp has 32 channels and walks along the tokens.

Letters: see the package; C all channels as one axis; w_t whether the carried state won token t, g the cotangent of h.

    forward    h_t = max(a_t + h_{t-1}, b_t)
    backward   e_t = g_t + w_{t+1} e_{t+1};   da_t = w_t e_t,  db_t = (1 - w_t) e_t,  dh_0 = da_1     in reverse
Sixteen tokens are read at a time, so that the memory works while they are folded in one after the other; h is that of
the reference to the bit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import pallas
from kernels.tropical import vectors
from kernels.tropical.scan.arguments import Arguments

CHANNELS = 32
UNROLL = 16


def why_unsupported(arguments: Arguments) -> str | None:
    """The kernel has float32 only."""
    return vectors.why_not_float32(arguments.a.dtype)


def pallas_gpu(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """h [B, T, ...] float32 and whether the carried state won, bool [B, T, ...]."""
    B, T, shape = *arguments.a.shape[:2], arguments.a.shape
    a, b = (x.reshape(B, T, -1) for x in (arguments.a, arguments.b))
    h, won = _scan(pallas.interpret(), a, b, arguments.h0.reshape(B, -1))
    return h.reshape(shape), won.reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(how, a, b, h0):
    """a, b [B, T, C], h0 [B, C] -> h, won [B, T, C]."""
    T, C = a.shape[1:]
    a_padded, b_padded = _pad(how, a, 0), _pad(how, b, -jnp.inf)
    one = [pl.BlockSpec((None, CHANNELS), lambda c, b: (b, c))]
    (h,) = _call(
        how, _kernel, "maxplus_scan_forward", 1, 2, (a_padded, b_padded), one, vectors.pad(h0, 1, CHANNELS)
    )
    h = h[:, :T, :C]
    return h, a + jnp.concatenate([h0[:, None], h[:, :-1]], axis=1) >= b


def _forward(how, a, b, h0):
    h, won = _scan(how, a, b, h0)
    return (h, won), won


def _backward(how, won, cotangents):
    (T, C), operands = won.shape[1:], (_pad(how, won.astype(jnp.int8), 0), _pad(how, cotangents[0], 0))
    da, db = (x[:, :T, :C] for x in _call(how, _backward_kernel, "maxplus_scan_backward", 2, 3, operands, []))
    return da, db, da[:, 0]


_scan.defvjp(_forward, _backward)


def _unroll(how):
    """Tokens read at a time; few in a simulation."""
    return 4 if how else UNROLL


def _pad(how, x, fill):
    return vectors.pad(vectors.pad(x, 1, _unroll(how), fill), 2, CHANNELS, fill)


def _call(how, kernel, name, outputs, operations, sequences, specs, *more):
    """Run a kernel on [B, Tp, Cp] sequences and further operands with their specs; `outputs` such sequences result."""
    B, Tp, Cp = sequences[0].shape
    whole = pl.BlockSpec((None, Tp, CHANNELS), lambda c, b: (b, 0, c))
    size = B * Tp * Cp
    return pl.pallas_call(
        partial(kernel, _unroll(how)),
        grid=(Cp // CHANNELS, B),
        in_specs=[*[whole] * len(sequences), *specs],
        out_specs=[whole] * outputs,
        out_shape=[jax.ShapeDtypeStruct((B, Tp, Cp), jnp.float32)] * outputs,
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=operations * size, transcendentals=0, bytes_accessed=4 * size * (len(sequences) + outputs)
        ),
        interpret=how,
        name=name,
    )(*sequences, *more)


def _kernel(unroll, a_ref, b_ref, h0_ref, h_ref):
    def tokens(n, h):
        # All reads come first: behind a write the compiler would not move them.
        read = [(a_ref[n * unroll + u, :], b_ref[n * unroll + u, :]) for u in range(unroll)]
        for u, (a, b) in enumerate(read):
            h = jnp.maximum(a + h, b)
            h_ref[n * unroll + u, :] = h
        return h

    jax.lax.fori_loop(0, a_ref.shape[0] // unroll, tokens, h0_ref[...])


def _backward_kernel(unroll, won_ref, g_ref, da_ref, db_ref):
    turns = g_ref.shape[0] // unroll

    def tokens(n, carried):
        places = [(turns - n) * unroll - 1 - u for u in range(unroll)]
        read = [(won_ref[t, :], g_ref[t, :]) for t in places]
        for t, (won, g) in zip(places, read, strict=True):
            e, kept = g + carried, won.astype(jnp.int32) > 0
            carried = jnp.where(kept, e, 0.0)
            da_ref[t, :] = carried
            db_ref[t, :] = jnp.where(kept, 0.0, e)
        return carried

    jax.lax.fori_loop(0, turns, tokens, jnp.zeros((CHANNELS,), jnp.float32))
