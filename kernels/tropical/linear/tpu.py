"""Max-plus linear attention as a TPU kernel: the recurrence itself, its state in registers.

Letters: see the package; C tokens of a chunk, t a token, p the channel d' that won. Channels d' lie on rows and d on
lanes, so that k_t and q_t are columns, v_t a row, and the maximum over d' joins whole registers. Each entry of the
state carries a code, (index of its key + 1) D + d', with 0 .. D - 1 for the initial state: the smallest code among
equal sums names the oldest key and the lowest channel, as the definition has it.

    per token    M = max(a_t + M, k_t + v_t);    c_t = max over d' of q_t + M, with the smallest code of the largest
Every sum is one of the definition's, so all results are those of the reference to the bit.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas
from kernels.tropical import vectors
from kernels.tropical.linear.arguments import Arguments
from kernels.tropical.linear.tpu_backward import run_back

LANES = 128
TURN = 8  # tokens of one turn of the loop: columns are known in it, and it ends by rotating the next ones to the front
LARGEST = jnp.iinfo(jnp.int32).max


def why_unsupported(arguments: Arguments) -> str | None:
    """float32 only, and codes must fit an int32."""
    T, D = arguments.q.shape[1], arguments.q.shape[3] + -arguments.q.shape[3] % 8
    if (T + 1) * D > LARGEST:
        return f"codes of {T=} tokens and {D=} channels do not fit an int32; take implementation='blockwise'"
    return vectors.why_not_float32(arguments.q.dtype)


def pallas_tpu(arguments: Arguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    """c and winners [B, T, H, Dv] (-1: initial state), and the last state [B, K, D, Dv], float32 and int32."""
    x = dataclasses.replace(arguments, a=jnp.where(arguments.fresh[..., None], -jnp.inf, arguments.a))
    D, how = x.q.shape[3], pallas.interpret()
    q, k = vectors.pad(x.q, 3, 8), vectors.pad(x.k, 3, 8, -jnp.inf)
    c, code, state = _attend(how, q, k, x.v, x.a, vectors.pad(x.m0, 2, 8, -jnp.inf))
    return c, code // q.shape[3] - 1, state[:, :, :D]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, q, k, v, a, m0):
    """D is a multiple of 8 -> c and its code [B, T, H, Dv], state [B, K, D, Dv]."""
    return _run(how, q, k, v, a, m0)[:3]


def _forward(how, q, k, v, a, m0):
    c, code, state, starts = _run(how, q, k, v, a, m0)
    some = state > -jnp.inf
    p = jnp.where(c > -jnp.inf, code % q.shape[3], -1)
    return (c, code, state), (q, k, v, a, starts, p, some)


def _backward(how, residuals, cotangents):
    *operands, some = residuals
    return run_back(how, _chunk(how), *operands, cotangents[0], jnp.where(some, cotangents[2], 0))


_attend.defvjp(_forward, _backward)


def _chunk(how):
    """Tokens of a chunk, which lie on lanes; few in a simulation."""
    return TURN if how else LANES


def _run(how, q, k, v, a, m0):
    """c, code, the last state, and the state before each chunk [B, K, chunks, D, Dv]."""
    (B, T, H, D), (K, Dv), C = q.shape, v.shape[2:], _chunk(how)
    G = H // K
    q = vectors.pad(q.reshape(B, T, K, G, D).transpose(0, 2, 3, 4, 1), 4, C)  # [B, K, G, D, Tp]
    k = vectors.pad(k.transpose(0, 2, 3, 1), 3, C, -jnp.inf)  # [B, K, D, Tp]
    v = vectors.pad(v.swapaxes(1, 2), 2, C)  # [B, K, Tp, Dv]
    a = vectors.pad(a.swapaxes(1, 2), 2, C)  # [B, K, Tp]
    chunks = v.shape[2] // C
    whole = pl.BlockSpec((None, None, D, Dv), lambda b, h, n: (b, h, 0, 0))
    rows = pl.BlockSpec((None, None, G, C, Dv), lambda b, h, n: (b, h, 0, n, 0))
    shape = (B, K, G, v.shape[2], Dv)
    c, code, state, starts = pl.pallas_call(
        _kernel,
        grid=(B, K, chunks),
        in_specs=[
            pl.BlockSpec((None, None, None, 1, C), lambda b, h, n: (b, h, n, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((None, None, G, D, C), lambda b, h, n: (b, h, 0, 0, n)),
            pl.BlockSpec((None, None, D, C), lambda b, h, n: (b, h, 0, n)),
            pl.BlockSpec((None, None, C, Dv), lambda b, h, n: (b, h, n, 0)),
            whole,
        ],
        out_specs=[
            rows,
            rows,
            whole,
            pl.BlockSpec((None, None, None, D, Dv), lambda b, h, n: (b, h, n, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct((B, K, D, Dv), jnp.float32),
            jax.ShapeDtypeStruct((B, K, chunks, D, Dv), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((D, Dv), jnp.float32),
            pltpu.VMEM((D, Dv), jnp.int32),
            pltpu.VMEM((G, D, C), jnp.float32),
            pltpu.VMEM((D, C), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=B * K * v.shape[2] * D * Dv * (5 + 5 * G),
            transcendentals=0,
            bytes_accessed=4
            * (q.size + k.size + v.size + 2 * B * H * v.shape[2] * Dv + B * K * chunks * D * Dv),
        ),
        interpret=how,
        name="maxplus_linear_forward",
    )(a.reshape(B, K, chunks, 1, C), q, k, v, m0)
    c, code = (x[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, H, Dv) for x in (c, code))
    return c, code, state, starts


def _kernel(
    a_ref, q_ref, k_ref, v_ref, m0_ref, c_ref, code_ref, end_ref, start_ref, state, codes, queries, keys
):
    """a [1, C], q [G, D, C], k [D, C], v [C, Dv]; queries and keys: copies that are rotated from turn to turn.

    Some rows d' at a time, whose state then stays in registers for the whole chunk.
    """
    n, (G, D, C), Dv = pl.program_id(2), q_ref.shape, v_ref.shape[1]

    @pl.when(n == 0)
    def _start():
        state[...], codes[...] = m0_ref[...], jax.lax.broadcasted_iota(jnp.int32, (D, Dv), 0)

    start_ref[...] = state[...]
    queries[...], keys[...] = q_ref[...], k_ref[...]
    c_ref[...] = jnp.full(c_ref.shape, -jnp.inf, jnp.float32)
    code_ref[...] = jnp.full(code_ref.shape, LARGEST, jnp.int32)

    def group(r):
        channel = r.start + jax.lax.broadcasted_iota(jnp.int32, (r.size, Dv), 0)

        def turn(at, carry):
            eight, (M, code) = pl.ds(pl.multiple_of(at * TURN, TURN), TURN), carry
            q, k, v, found = [queries[g, r, :] for g in range(G)], keys[r, :], v_ref[eight, :], []
            for u in range(TURN):
                t = n * C + at * TURN + u
                M, new = a_ref[0, at * TURN + u] + M, k[:, u : u + 1] + v[u : u + 1]
                M, code = jnp.maximum(M, new), jnp.where(new <= M, code, (t + 1) * D + channel)
                found.append([_read(q[g][:, u : u + 1], M, code) for g in range(G)])
            for g in range(G):
                c, winners = (jnp.concatenate([rows[g][part] for rows in found]) for part in range(2))
                _keep_larger(c_ref, code_ref, (g, eight), c, winners)
                queries[g, r, :] = pltpu.roll(q[g], C - TURN, 1)
            keys[r, :] = pltpu.roll(k, C - TURN, 1)
            return M, code

        state[r, :], codes[r, :] = jax.lax.fori_loop(0, C // TURN, turn, (state[r, :], codes[r, :]))

    vectors.in_groups(D, group, 32)
    end_ref[...] = state[...]


def _keep_larger(c_ref, code_ref, at, c, code):
    """Join maxima and codes over further channels to those already at this place."""
    held, of_held = c_ref[at], code_ref[at]
    joined = jnp.where(c == held, jnp.minimum(code, of_held), jnp.where(c > held, code, of_held))
    c_ref[at], code_ref[at] = jnp.maximum(c, held), joined


def _read(q, M, code):
    """Largest q + M over channels d' and its smallest code, two [1, Dv]; q [D, 1]."""
    sums = q + M
    c = jnp.max(sums, axis=0, keepdims=True)
    return c, jnp.min(jnp.where(sums == c, code, LARGEST), axis=0, keepdims=True)
