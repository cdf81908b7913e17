"""The backward pass of the max-plus linear attention kernel: the recurrence reversed, nothing scattered.

Letters: see `tpu.py`; g the cotangent of c, p its winning channel (-1: none), E the cotangent of the state M.

    per chunk, last one first   the states again, keeping one bit an entry: whether the carried one won token t
    per token, last one first   E += g_t at p_t (its sum over d is dq_t);  where the new one won, E goes to k_t and v_t,
                                elsewhere on to the state before, and is the gradient of a_t
Bits of eight tokens share a word. Rows d' of the state are independent and taken some at a time.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.tropical import vectors

TURN = 8
ROWS = 32  # of the state at a time


def run_back(how, C, q, k, v, a, starts, p, g, dstate):
    """dq, dk, dv, da, dm0 of operands as `tpu._attend` has them; p, g [B, T, H, Dv], starts [B, K, chunks, D, Dv]."""
    (B, T, H, D), (K, Dv) = q.shape, v.shape[2:]
    G, chunks = H // K, starts.shape[2]
    k = vectors.pad(k.transpose(0, 2, 3, 1), 3, C, -jnp.inf)  # [B, K, D, Tp]
    v = vectors.pad(v.swapaxes(1, 2), 2, C)  # [B, K, Tp, Dv]
    a = vectors.pad(a.swapaxes(1, 2), 2, C).reshape(B, K, chunks, 1, C)
    p, g = (x.reshape(B, T, K, G, Dv).transpose(0, 2, 3, 1, 4) for x in (p, g))  # [B, K, G, T, Dv]
    p, g = vectors.pad(p, 3, C, -1), vectors.pad(g, 3, C)

    def block(*shape, axis, **options):
        """A chunk's part of an array [B, K, ...], along `axis` of what follows K; the last chunk comes first."""

        def index(b, h, n):
            place = [b, h, *(0 for _ in shape)]
            if axis is not None:
                place[2 + axis] = chunks - 1 - n
            return tuple(place)

        return pl.BlockSpec((None, None, *shape), index, **options)

    rows, keys, values = block(G, C, Dv, axis=1), block(D, C, axis=1), block(C, Dv, axis=0)
    whole = block(D, Dv, axis=None)
    float_of = lambda *shape: jax.ShapeDtypeStruct((B, K, *shape), jnp.float32)  # noqa: E731
    dq, dk, dv, da, dm0 = pl.pallas_call(
        _kernel,
        grid=(B, K, chunks),
        in_specs=[
            block(None, 1, C, axis=0, memory_space=pltpu.SMEM),
            keys,
            values,
            block(None, D, Dv, axis=0),
            rows,
            rows,
            whole,
        ],
        out_specs=[block(G, D, C, axis=2), keys, values, values, whole],
        out_shape=[
            float_of(G, D, chunks * C),
            float_of(D, chunks * C),
            float_of(chunks * C, Dv),
            float_of(chunks * C, Dv),
            float_of(D, Dv),
        ],
        scratch_shapes=[
            pltpu.VMEM((D, Dv), jnp.float32),
            pltpu.VMEM((C // TURN, ROWS, Dv), jnp.int32),
            pltpu.VMEM((ROWS, C), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=B * K * chunks * C * D * Dv * (14 + 4 * G),
            transcendentals=0,
            bytes_accessed=4 * (2 * k.size + 3 * v.size + 2 * p.size + B * H * chunks * C * D + starts.size),
        ),
        interpret=how,
        name="maxplus_linear_backward",
    )(a, k, v, starts, p, g, dstate)
    dq = dq[..., :T].transpose(0, 4, 1, 2, 3).reshape(B, T, H, D)
    da = da.sum(-1)[..., :T].swapaxes(1, 2)
    return dq, dk[..., :T].transpose(0, 3, 1, 2), dv[:, :, :T].swapaxes(1, 2), da, dm0


def _kernel(a_ref, k_ref, v_ref, start_ref, p_ref, g_ref, dstate_ref, dq_ref, dk_ref, dv_ref, da_ref, dm0_ref,
            state, kept, keys):  # fmt: skip
    """a [1, C], k [D, C], v [C, Dv], p, g [G, C, Dv]; da_ref [C, Dv] by lane; state holds E of the token after."""

    @pl.when(pl.program_id(2) == 0)
    def _start():
        state[...] = dstate_ref[...]

    dv_ref[...], da_ref[...] = jnp.zeros(dv_ref.shape, jnp.float32), jnp.zeros(da_ref.shape, jnp.float32)

    def group(r):
        _bits_of_chunk(a_ref, k_ref, v_ref, start_ref, kept, keys, r)
        state[r, :] = _turns(p_ref, g_ref, dq_ref, dk_ref, dv_ref, da_ref, kept, state[r, :], r)

    vectors.in_groups(k_ref.shape[0], group, ROWS)
    dm0_ref[...] = state[...]


def _turns(p_ref, g_ref, dq_ref, dk_ref, dv_ref, da_ref, kept, E, r):
    """Through the tokens of a chunk backwards, rows r of the state; returns E of the token before the chunk."""
    G, turns = dq_ref.shape[0], kept.shape[0]
    channel = r.start + jax.lax.broadcasted_iota(jnp.int32, E.shape, 0)

    def turn(n, E):
        at = turns - 1 - n
        eight, bits = pl.ds(pl.multiple_of(at * TURN, TURN), TURN), kept[at, : r.size]
        p, g = [p_ref[h, eight, :] for h in range(G)], [g_ref[h, eight, :] for h in range(G)]
        of_q, of_k, of_v, of_a = [[] for _ in range(G)], [], [], []
        for u in reversed(range(TURN)):
            for h in range(G):
                share = jnp.where(channel == p[h][u : u + 1], g[h][u : u + 1], 0)
                E += share
                of_q[h].append(share.sum(1, keepdims=True))
            carried = (bits & (1 << u)) != 0
            new, E = jnp.where(carried, 0, E), jnp.where(carried, E, 0)
            of_k.append(new.sum(1, keepdims=True))
            of_v.append(new.sum(0, keepdims=True))
            of_a.append(E.sum(0, keepdims=True))
        for h in range(G):
            dq_ref[h, r, :] = _in_front(dq_ref[h, r, :], of_q[h])
        dk_ref[r, :] = _in_front(dk_ref[r, :], of_k)
        dv_ref[eight, :] += jnp.concatenate(of_v[::-1])
        da_ref[eight, :] += jnp.concatenate(of_a[::-1])
        return E

    dq_ref[:, r, :], dk_ref[r, :] = (jnp.zeros(x.shape, jnp.float32) for x in (dq_ref[:, r, :], dk_ref[r, :]))
    return jax.lax.fori_loop(0, turns, turn, E)


def _bits_of_chunk(a_ref, k_ref, v_ref, start_ref, kept, keys, r):
    """kept [turns, rows, Dv]: bit u of word n says that the carried entry won token 8 n + u; keys [rows, C] scratch."""
    C = k_ref.shape[1]
    keys[: r.size, :] = k_ref[r, :]

    def turn(at, M):
        k, v = keys[: r.size, :], v_ref[pl.ds(pl.multiple_of(at * TURN, TURN), TURN), :]
        bits = jnp.zeros(M.shape, jnp.int32)
        for u in range(TURN):
            M, new = a_ref[0, at * TURN + u] + M, k[:, u : u + 1] + v[u : u + 1]
            bits |= jnp.where(new <= M, 1 << u, 0)
            M = jnp.maximum(M, new)
        kept[at, : r.size], keys[: r.size, :] = bits, pltpu.roll(k, C - TURN, 1)
        return M

    jax.lax.fori_loop(0, C // TURN, turn, start_ref[r, :])


def _in_front(x, columns):
    """Rotate x [D, C] by a turn and put the columns [D, 1] of this turn, the last token's first, before it."""
    x = pltpu.roll(x, TURN, 1)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    for u, column in zip(reversed(range(TURN)), columns, strict=True):
        x = jnp.where(lane == u, column, x)
    return x
