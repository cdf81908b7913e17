"""The max-plus scan as a TPU kernel: the state stays in registers, every token and channel is read once.

Letters: see the package; C all channels as one axis, on lanes; bt tokens and bc channels of a block; w_t whether the
carried state won token t, g the cotangent of h.

    forward    h_t = max(a_t + h_{t-1}, b_t)                          blocks of tokens in order, h handed on in scratch
    backward   e_t = g_t + w_{t+1} e_{t+1};   da_t = w_t e_t,  db_t = (1 - w_t) e_t,  dh_0 = da_1     and in reverse
Tokens follow each other one by one, eight a turn of the loop: two operations each, and no sum but those of the
definition, so h is that of the reference to the bit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas
from kernels.tropical import vectors
from kernels.tropical.scan.arguments import Arguments

TOKENS, CHANNELS = 256, 1024  # of a block, where the sizes reach that far
UNROLL = 8


def why_unsupported(arguments: Arguments) -> str | None:
    """The kernel has float32 only."""
    return vectors.why_not_float32(arguments.a.dtype)


def pallas_tpu(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """h [B, T, ...] float32 and whether the carried state won, bool [B, T, ...]."""
    B, T, shape = *arguments.a.shape[:2], arguments.a.shape
    a, b = (x.reshape(B, T, -1) for x in (arguments.a, arguments.b))
    h, won = _scan(pallas.interpret(), a, b, arguments.h0.reshape(B, -1))
    return h.reshape(shape), won.reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(how, a, b, h0):
    """a, b [B, T, C], h0 [B, C] -> h, won [B, T, C]."""
    h = _run(how, a, b, h0)
    return h, a + jnp.concatenate([h0[:, None], h[:, :-1]], axis=1) >= b


def _forward(how, a, b, h0):
    h, won = _scan(how, a, b, h0)
    return (h, won), won


def _backward(how, won, cotangents):
    da, db = _run_back(how, won, cotangents[0])
    return da, db, da[:, 0]


_scan.defvjp(_forward, _backward)


def _layout(how, T, C):
    """Block sizes, those of a simulation small, and the specification of a block whose tokens `index` places."""
    tokens, channels = (8, 16) if how else (TOKENS, CHANNELS)
    bt, bc = min(tokens, T + -T % UNROLL), C if channels >= C else channels
    return bt, bc, lambda index: pl.BlockSpec((None, bt, bc), lambda b, c, t: (b, index(t), c))


def _settings(how, size, operations, moved):
    return {
        "compiler_params": pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        "cost_estimate": pl.CostEstimate(
            flops=operations * size, transcendentals=0, bytes_accessed=moved * size
        ),
        "interpret": how,
    }


def _run(how, a, b, h0):
    (B, T, C), (bt, bc, block) = a.shape, _layout(how, *a.shape[1:])
    a, b = vectors.pad(a, 1, bt), vectors.pad(b, 1, bt, -jnp.inf)
    forth = block(lambda t: t)
    return pl.pallas_call(
        _kernel,
        grid=(B, -(-C // bc), a.shape[1] // bt),
        in_specs=[forth, forth, pl.BlockSpec((None, 1, bc), lambda b, c, t: (b, 0, c))],
        out_specs=forth,
        out_shape=jax.ShapeDtypeStruct(a.shape, jnp.float32),
        scratch_shapes=[pltpu.VMEM((1, bc), jnp.float32)],
        name="maxplus_scan_forward",
        **_settings(how, a.size, 2, 12),
    )(a, b, h0[:, None])[:, :T]


def _kernel(a_ref, b_ref, h0_ref, h_ref, state):
    @pl.when(pl.program_id(2) == 0)
    def _start():
        state[...] = h0_ref[...]

    def tokens(n, h):
        eight = pl.ds(pl.multiple_of(n * UNROLL, UNROLL), UNROLL)
        a, b = a_ref[eight, :], b_ref[eight, :]
        rows = []
        for u in range(UNROLL):
            h = jnp.maximum(a[u : u + 1] + h, b[u : u + 1])
            rows.append(h)
        h_ref[eight, :] = jnp.concatenate(rows)
        return h

    state[...] = jax.lax.fori_loop(0, a_ref.shape[0] // UNROLL, tokens, state[...])


def _run_back(how, won, g):
    (B, T, C), (bt, bc, block) = g.shape, _layout(how, *g.shape[1:])
    won, g = vectors.pad(won.astype(jnp.float32), 1, bt), vectors.pad(g, 1, bt)
    blocks = g.shape[1] // bt
    back = block(lambda t: blocks - 1 - t)
    da, db = pl.pallas_call(
        _backward_kernel,
        grid=(B, -(-C // bc), blocks),
        in_specs=[back, back],
        out_specs=[back, back],
        out_shape=[jax.ShapeDtypeStruct(g.shape, jnp.float32)] * 2,
        scratch_shapes=[pltpu.VMEM((1, bc), jnp.float32)],
        name="maxplus_scan_backward",
        **_settings(how, g.size, 3, 16),
    )(won, g)
    return da[:, :T], db[:, :T]


def _backward_kernel(won_ref, g_ref, da_ref, db_ref, state):
    """state holds da of the token after the block."""

    @pl.when(pl.program_id(2) == 0)
    def _start():
        state[...] = jnp.zeros(state.shape, state.dtype)

    turns = g_ref.shape[0] // UNROLL

    def tokens(n, carried):
        eight = pl.ds(pl.multiple_of((turns - 1 - n) * UNROLL, UNROLL), UNROLL)
        won, g, of_a, of_b = won_ref[eight, :], g_ref[eight, :], [], []
        for u in reversed(range(UNROLL)):
            e, kept = g[u : u + 1] + carried, won[u : u + 1] > 0
            carried = jnp.where(kept, e, 0)
            of_a.append(carried)
            of_b.append(jnp.where(kept, 0, e))
        da_ref[eight, :], db_ref[eight, :] = jnp.concatenate(of_a[::-1]), jnp.concatenate(of_b[::-1])
        return carried

    state[...] = jax.lax.fori_loop(0, turns, tokens, state[...])
