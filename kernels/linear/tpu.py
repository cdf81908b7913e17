"""Linear attention on TPU: Pallas sweeps over chunks, forward and backward, in the frame of `lines.py`.

Letters: B batch, L positions in N chunks of C, H query heads, K key/value heads, J grid steps over heads, G query heads
of each, D channels of q and k, E of v, P parts of a state.

The sums over all keys that masks without causality ask for are XLA's: a kernel would take as long.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import pallas, tiles
from kernels.linear import lines
from kernels.linear.arguments import Arguments, State
from kernels.linear.blockwise import CHUNK, turned_back
from kernels.linear.chunks import make_tables
from kernels.linear.lines import Line
from kernels.linear.tpu_backward import backward
from kernels.linear.tpu_chunk import Plan, level_table
from kernels.linear.tpu_forward import forward

SMALLEST = 16  # rows of a tile of bfloat16
STATE = 2**17  # numbers of a state, at most
CHANNELS = 256  # of q and k (twice that with an angle), and of v, at most, with decays of channels
ROWS = 512  # of all query heads of a grid step, at most, with 128 channels; half with decays of channels


def tpu(arguments: Arguments) -> tuple[jax.Array, jax.Array | None, State]:
    """Numerator [B, T, H, Dv], denominator [B, T, H] and the state after the last key, in float32."""
    scan = partial(sweep_line, pallas.interpret())
    return lines.evaluate(arguments, scan, turns_and_decays=True)


def why_unsupported(arguments: Arguments) -> str | None:
    if arguments.allowed is not None:
        return "it takes no dense `allowed` matrix, which has T x S entries"
    if arguments.accumulator == jnp.float64:
        return "float64 is not a TPU's; cast q, k and v to float32, or use 'blockwise'"
    D, Dv, parts = arguments.k.shape[3], arguments.v.shape[3], 1 if arguments.angle is None else 2
    if parts * D * Dv > STATE:
        what = f"a state of {parts} x {D=} x {Dv=} numbers passes the {STATE} that fit"
        return f"{what} a core's memory with their gradients; split the channels of v, or use 'blockwise'"
    of_channels = arguments.value_decay is not None or (arguments.decays and arguments.key_decay.shape[3] > 1)
    if of_channels and max(parts * D, Dv) > CHANNELS:
        what = f"decays of channels with {parts} x {D=} and {Dv=} pass {CHANNELS} channels"
        return f"{what}, for which a core's memory suffices; use 'blockwise'"
    return None


def chunk_of(length: int, chunk_size: int | None) -> int:
    """A power of two up to chunk_size (CHUNK), not below SMALLEST, no longer than the line needs."""
    most = 1 << ((chunk_size or CHUNK).bit_length() - 1)
    return max(SMALLEST, min(most, 1 << (length - 1).bit_length()))


def sweep_line(interpret, line: Line) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """See `lines.Scan`."""
    (B, L, H, _), K, E = line.q.shape, line.k.shape[2], line.v.shape[3]
    plan = _plan(interpret, line)
    extra = plan.chunks * plan.chunk - L
    results = _sweep(plan, _operands(plan, line), _constants(plan, line))
    num = results["num"].reshape(B, K * plan.blocks, plan.heads, L + extra, E)
    num = num.transpose(0, 3, 1, 2, 4).reshape(B, L + extra, H, E)[:, :L]
    den, state = None, results["end"][:, :: plan.blocks]
    if plan.denominator:
        den = results["den"].transpose(0, 2, 4, 1, 3).reshape(B, L + extra, H)[:, :L]
        state = jnp.concatenate([state, results["end_ones"][:, :: plan.blocks, :, :, None]], axis=-1)
    return num, den, turned_back(state.transpose(2, 0, 1, 3, 4), line.angle, extra)


def _plan(interpret, line):
    L, G = line.q.shape[1], line.q.shape[2] // line.k.shape[2]
    C, number = chunk_of(L, line.chunk_size), line.key_decay is not None and line.key_decay.shape[3] == 1
    keys, values = line.key_decay is not None and not number, line.value_decay is not None
    rows = (
        ROWS
        * tiles.LANES
        // max(tiles.LANES, line.q.shape[3], line.v.shape[3])
        // (2 if keys or values else 1)
    )
    heads = max(n for n in range(1, G + 1) if G % n == 0 and (n == 1 or n * CHUNK <= rows))
    return Plan(
        chunk=C, chunks=-(-L // C), heads=heads, blocks=G // heads, parts=line.state.shape[0], number=number,
        keys=keys, values=values, documents=line.documents is not None, denominator=line.denominator,
        interpret=interpret,
    )  # fmt: skip


def _operands(plan, line):
    """The float operands as `tpu_specs` names and lays them out, padded to whole chunks."""
    (B, _, _, D), K, length = line.q.shape, line.k.shape[2], plan.chunks * plan.chunk
    operands = {n: getattr(line, n) for n in ("q", "k", "v", "key_decay", "value_decay")}
    operands = {n: tiles.pad(x, 1, length) for n, x in operands.items() if x is not None}
    narrow = line.q.dtype == line.k.dtype == line.v.dtype == jnp.bfloat16
    for name in ("q", "k", "v"):
        operands[name] = operands[name].astype(jnp.bfloat16 if narrow else jnp.float32)
    q = operands["q"].reshape(B, length, K * plan.blocks, plan.heads, D).transpose(0, 2, 3, 1, 4)
    operands = {n: x.swapaxes(1, 2) for n, x in operands.items()} | {"q": q}
    if plan.number:
        operands["key_decay"] = operands["key_decay"].reshape(B, K, plan.chunks, 1, plan.chunk)
    state = line.state.transpose(1, 2, 0, 3, 4)
    if not plan.denominator:
        return operands | {"state": state}
    return operands | {"state": state[..., :-1], "ones": state[..., -1]}


def _constants(plan, line):
    """Documents as numbers of runs, and the tables."""
    B, C, N = line.q.shape[0], plan.chunk, plan.chunks
    constants = {"bounds": jnp.zeros((B, N + 1), jnp.int32)}
    if plan.documents:
        ids = tiles.pad(line.documents, 1, N * C, "edge")
        runs = jnp.cumsum(ids[:, 1:] != ids[:, :-1], axis=1, dtype=jnp.int32)
        runs = jnp.pad(runs, ((0, 0), (1, 0)))
        current = jnp.max(jnp.where(ids == line.current[:, None], runs, -1), axis=1, keepdims=True)
        constants["bounds"] = jnp.concatenate([current, runs[:, C - 1 :: C]], axis=1)
        constants["runs"] = runs.reshape(B, N, 1, C)
    if plan.keys or plan.values:
        constants["level"] = level_table(C)
    if plan.parts == 2:
        tables = make_tables(line.angle, C, jnp.float32)
        constants["toe"] = tables.toe
        constants["phases"] = jnp.concatenate([tables.at, tables.to_end]).swapaxes(0, 1)[..., None]
        constants["turn"] = tables.turn[:, 0].swapaxes(0, 1)[..., None]
    return constants


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sweep(plan, operands, constants):
    """operands, constants: see `tpu_specs`; a dict of num, end and with a denominator den, end_ones."""
    return forward(plan, operands, constants, save_states=False)


def _sweep_forward(plan, operands, constants):
    results = forward(plan, operands, constants, save_states=True)
    starts = {n: results.pop(n) for n in ("starts", "starts_ones") if n in results}
    return results, (operands, constants, starts)


def _sweep_backward(plan, residuals, cotangents):
    operands, constants, starts = residuals
    cotangents = {"d" + name: x for name, x in cotangents.items()}
    cotangents["dnum"] = cotangents["dnum"].astype(operands["v"].dtype)
    found = backward(plan, operands, constants, starts | cotangents)
    gradients = {name: found["d" + name] for name in operands}
    for name, x in operands.items():
        if name != "q" and plan.blocks > 1:
            shape = (x.shape[0], x.shape[1], plan.blocks, *x.shape[2:])
            gradients[name] = gradients[name].reshape(shape).sum(2)
        gradients[name] = gradients[name].astype(x.dtype)
    return gradients, None


_sweep.defvjp(_sweep_forward, _sweep_backward)
