"""Linear attention on GPU (Pallas-Triton): chunks in parallel, joined by a scan over their states.

Letters: B batch, L positions, N chunks of C, H query heads, K key/value heads, G = H / K, D head size, E = Dv columns
of a state Z [P, B, N, K, D, E] of P parts (real, and imaginary with an angle); z [P, B, N, K, D] the denominator's.

1. what each chunk adds to the state (kernel), 2. the states before each chunk (`gpu_states.py`), 3. the rows of each
chunk (kernel). The gradient: 1. and 2. again, 4. what the rows of a chunk ask of the state before it (kernel), 5. the
same backward through the chunks, 6. the gradients of each chunk (a kernel for features, one for values). States live
in HBM only between chunks. `lines.py` brings every call into this form.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import pallas
from kernels.linear import gpu_gradients, gpu_kernels, lines
from kernels.linear.arguments import Arguments, State
from kernels.linear.gpu_states import chain, joined, log_factor_gradients, parts
from kernels.linear.lines import Line

LARGEST = 128  # head sizes of a tile
BLOCK = 64  # channels of a program that takes gradients


def gpu(arguments: Arguments) -> tuple[jax.Array, jax.Array | None, State]:
    """Numerator [B, T, H, Dv], denominator [B, T, H] and the state after the last key, in float32."""
    return lines.evaluate(arguments, partial(scan, pallas.interpret()), turns_and_decays=True)


def why_unsupported(arguments: Arguments) -> str | None:
    a = arguments
    if a.allowed is not None:
        return "it takes no dense `allowed` matrix, which has T x S entries; use 'reference'"
    if a.accumulator == jnp.float64:
        return "it sums in float32, and the operands are float64; cast them, or use 'blockwise'"
    D, Dv = a.q.shape[3] * (2 if _angle_in_features(a) else 1), a.v.shape[3]
    if max(D, Dv) > LARGEST:
        return f"features of size {D} or values of size {Dv} exceed its tiles of {LARGEST}; use 'blockwise'"
    return None


def _angle_in_features(a):
    """Whether `lines.py` makes two features of one, its cosine and its sine."""
    vector = a.value_decay is not None or (a.key_decay is not None and a.key_decay.shape[3] > 1)
    return a.angle is not None and (a.angle.shape[1] > 1 or vector or not (a.mask.causal and a.aligned))


def chunk_size(line: Line) -> int:
    """A power of two, at most the one asked for. Larger chunks mean fewer states, and registers that spill."""
    wide, decay = line.k.dtype == jnp.float32, line.key_decay
    if line.value_decay is not None or (decay is not None and (wide or decay.shape[3] > 1)):
        best = 16
    else:
        best = 32 if wide or line.angle is not None else 64
    return best if line.chunk_size is None else max(16, min(best, pl.next_power_of_2(line.chunk_size)))


def scan(interpret, line: Line) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Sweeps a line; see `lines.Scan`."""
    (B, L, _, D), Dv, C = line.q.shape, line.v.shape[3], chunk_size(line)
    grow = [(0, 0), (0, -L % C), (0, 0)]
    wide = {n: max(16, pl.next_power_of_2(n)) - n for n in (D, Dv, 1)} | {1: 0}
    operands = {
        name: jnp.pad(x, [*grow, (0, wide[x.shape[3]])])
        for name, x in (
            ("q", line.q),
            ("k", line.k),
            ("v", line.v),
            ("g", line.key_decay),
            ("h", line.value_decay),
        )
        if x is not None
    }
    for name in ("q", "k", "v"):  # one-channel features still fill a tile
        x = operands[name]
        operands[name] = jnp.pad(x, [(0, 0)] * 3 + [(0, max(0, 16 - x.shape[3]))])
    D_tile, Dv_tile = operands["q"].shape[3], operands["v"].shape[3]
    if "h" in operands:
        operands["h"] = jnp.pad(operands["h"], [(0, 0)] * 3 + [(0, Dv_tile - operands["h"].shape[3])])
    if line.angle is not None:
        operands["angle"] = jnp.broadcast_to(line.angle, (B,)).astype(jnp.float32)
    if line.documents is not None:
        documents = jnp.broadcast_to(line.documents, (B, L)).astype(jnp.int32)
        operands |= {"documents": jnp.pad(documents, grow[:2], mode="edge"), "current": line.current}
    Z = jnp.pad(line.state, [(0, 0)] * 3 + [(0, D_tile - D), (0, 0)])
    operands["Z"] = jnp.pad(Z[..., :Dv], [(0, 0)] * 4 + [(0, Dv_tile - Dv)])
    if line.denominator:
        operands["z"] = Z[..., Dv]
    num, den, Z, z = _sweep(interpret, C, operands)
    state = Z[..., :D, :Dv]
    if line.denominator:
        state = jnp.concatenate([state, z[..., :D, None]], axis=-1)
    state = _turned_back(state, line.angle, -L % C)
    return num[:, :L, :, :Dv], den[:, :L] if line.denominator else None, state


def _turned_back(state, angle, extra):
    """The padding of the last chunk moved the point of view on."""
    if angle is None or not extra:
        return state
    cos, sin = (f(angle * extra)[:, None, None, None] for f in (jnp.cos, jnp.sin))
    return jnp.stack([cos * state[0] + sin * state[1], cos * state[1] - sin * state[0]])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sweep(interpret, C, operands):
    """Numerator, denominator or None, Z and z (or None) after L positions. L is a multiple of C; sizes powers of two.

    operands: q [B, L, H, D]; k [B, L, K, D]; v [B, L, K, E]; g [B, L, K, 1 or D], h [B, L, K, E] logarithms of decays;
    angle [B]; documents [B, L], current [B]; Z [P, B, K, D, E], z [P, B, K, D]. All but q, k, v, Z may be absent.
    """
    return _forward(interpret, C, operands)[0]


def _forward(interpret, C, operands):
    _, before, last = _states(interpret, C, operands)
    B, L, H, _ = operands["q"].shape
    out = {"num": jax.ShapeDtypeStruct((B, L, H, operands["v"].shape[3]), jnp.float32)}
    if "z" in operands:
        out["den"] = jax.ShapeDtypeStruct((B, L, H), jnp.float32)
    rows = _call(
        gpu_kernels.rows, "linear_rows", interpret, C, _tiles(operands, before, C), out, of_query=True
    )
    return (rows["num"], rows.get("den"), *last), operands


def _backward(interpret, C, operands, cotangents):
    dnum, dden, dZ_last, dz_last = cotangents
    x, (B, L, _, D), (K, E) = operands, operands["q"].shape, operands["v"].shape[2:]
    P, N, shape = len(x["Z"]), L // C, jax.ShapeDtypeStruct
    factors, before, _ = _states(interpret, C, x)
    tiles = _tiles(x, before, C) | {"dnum": dnum} | ({"dden": dden} if "z" in x else {})
    asked = {"Z": shape((P, B, N, K, D, E), jnp.float32)}
    asked |= {"z": shape((P, B, N, K, D), jnp.float32)} if "z" in x else {}
    asked = _call(gpu_kernels.asked, "linear_asked", interpret, C, tiles, asked)
    after, first = _chained_back(factors, asked, dZ_last, dz_last)
    tiles |= {"Y": after["Z"]} | ({"y": after["z"]} if "z" in x else {})
    got = _gradients_of_chunks(interpret, C, x, tiles)
    gradients = {
        name: got[f"d{name}"].astype(x[name].dtype) for name in ("q", "k", "v", "g", "h") if name in x
    }
    through = log_factor_gradients(factors, before, after, x.get("g"), x.get("h"))
    for name, total in through.items():  # every position of a chunk lies on the state's way through it
        gradients[name] += jnp.repeat(total, C, axis=1)
    gradients |= {"Z": first["Z"]} | ({"z": first["z"]} if "z" in x else {})
    if "angle" in x:
        gradients["angle"] = jnp.zeros_like(x["angle"])  # a constant
    return ({name: gradients.get(name) for name in x},)


_sweep.defvjp(_forward, _backward)


def _gradients_of_chunks(interpret, C, x, tiles):
    """dq, dk, dv and those of the decays there are, by way of the chunk that a position stands in."""
    D, E, shape = x["q"].shape[3], x["v"].shape[3], jax.ShapeDtypeStruct
    features, values = (max(1, size // BLOCK) for size in (D, E))
    out = {f"d{name}": shape(x[name].shape, jnp.float32) for name in ("q", "k", "v", "g", "h") if name in x}
    of_values = {name: out.pop(name) for name in ("dv", "dh") if name in out}
    if "dg" in out and x["g"].shape[3] == 1:  # every block of channels brings a share
        out["dg_share"] = shape((*out.pop("dg").shape[:3], features), jnp.float32)
    ours = dict.fromkeys(
        ("q", "k", "dq", "dk", "z", "y", "dg", "dg_share", *(["g"] if "dg" in out else [])), -1
    )
    some = _call(
        gpu_gradients.of_features, "linear_gradients_of_features", interpret, C, tiles, out,
        split=Split(features, ours | {"Z": -2, "Y": -2}),
    )  # fmt: skip
    ours = dict.fromkeys(("v", "dnum", "h", "dv", "dh", "Z", "Y"), -1)
    some |= _call(
        gpu_gradients.of_values, "linear_gradients_of_values", interpret, C, tiles, of_values,
        split=Split(values, ours),
    )  # fmt: skip
    return some | ({"dg": some["dg_share"].sum(-1, keepdims=True)} if "dg_share" in some else {})


def _states(interpret, C, x):
    """Factors of the state over each chunk, the states {Z, z} before each chunk, and (Z, z) after the last."""
    (B, L, K, D), E, P, shape = x["k"].shape, x["v"].shape[3], len(x["Z"]), jax.ShapeDtypeStruct
    out = {"Z": shape((P, B, L // C, K, D, E), jnp.float32)}
    out |= {"z": shape((P, B, L // C, K, D), jnp.float32)} if "z" in x else {}
    added = _call(gpu_kernels.added, "linear_added", interpret, C, _tiles(x, {}, C), out)
    factors = _factors(x, C)
    before, last = {}, []
    for name in ("Z", "z"):
        if name in x:
            f = factors if name == "Z" else factors[..., 0]
            some, end = chain(f, joined(added[name]), joined(x[name]))
            before[name] = parts(some, P)
            last.append(parts(end, P))
        else:
            last.append(None)
    return factors, before, last


def _chained_back(factors, asked, dZ_last, dz_last):
    """Adjoints {Z, z} of the states after each chunk, and of the ones before the first."""
    after, first = {}, {}
    for name, end in (("Z", dZ_last), ("z", dz_last)):
        if name in asked:
            P = len(asked[name])
            f = factors if name == "Z" else factors[..., 0]
            some, begin = chain(jnp.conj(f)[:, ::-1], joined(asked[name])[:, ::-1], joined(end))
            after[name], first[name] = parts(some[:, ::-1], P), parts(begin, P)
    return after, first


def _factors(x, C):
    """What a chunk does to the state before it, [B, N, K or 1, D or 1, E or 1], complex with an angle."""
    B, L = x["k"].shape[:2]
    f = jnp.ones((B, L // C, 1, 1, 1), jnp.float32)
    if "g" in x:
        f = f * jnp.exp(_chunked(x["g"], C).sum(2))[..., None]
    if "h" in x:
        f = f * jnp.exp(_chunked(x["h"], C).sum(2))[:, :, :, None]
    if "documents" in x:
        now, before = _documents(x, C)
        f = f * (now == before)[:, :, None, None, None]
    if "angle" in x:
        turn = jax.lax.complex(jnp.cos(x["angle"] * C), jnp.sin(x["angle"] * C))
        f = f * turn[:, None, None, None, None]
    return f


def _documents(x, C):
    """The last document of each chunk and that of the state before it, [B, N]."""
    last = x["documents"][:, C - 1 :: C]
    return last, jnp.concatenate([x["current"][:, None], last[:, :-1]], axis=1)


def _tiles(x, before, C):
    """Operands of the kernels: those of positions, and what is one a chunk."""
    tiles = {name: x[name] for name in ("q", "k", "v", "g", "h", "documents") if name in x} | before
    tiles |= {"g": x["g"][..., 0]} if "g" in x and x["g"].shape[3] == 1 else {}
    if "documents" in x:
        tiles["last"], tiles["current"] = _documents(x, C)
    if "angle" in x:  # of the steps from the chunk's first position, then of those to its end
        steps = jnp.stack([jnp.arange(C), C - jnp.arange(C)]).astype(jnp.float32)
        phase = x["angle"][:, None, None] * steps
        tiles["phases"] = jnp.stack([jnp.cos(phase), jnp.sin(phase)], axis=2).reshape(-1, 4, C)
    return tiles


def _chunked(x, C):
    return x.reshape(x.shape[0], -1, C, *x.shape[2:])


class Split(NamedTuple):
    """Programs of a chunk and head that share its channels, and along which axis of the operands of these names."""

    blocks: int
    axes: dict[str, int]


def _call(kernel, name, interpret, C, tiles, out, of_query=False, split=Split(1, {})):  # noqa: B008 (constant)
    """Runs a kernel body on every chunk and key/value head (or query head); tiles and results go by their names."""
    B, L, H, D = tiles["q"].shape
    K, E = tiles["v"].shape[2:]
    specs = partial(_spec, C, H // K, of_query, split)

    def body(ins, outs):
        kernel(partial(gpu_kernels.dot, interpret is not False, tiles["k"].dtype), ins, outs, C, H // K)

    return pl.pallas_call(
        body,
        grid=(L // C, (H if of_query else K) * split.blocks, B),
        in_specs=[{n: specs(n, x) for n, x in tiles.items()}],
        out_specs={n: specs(n, x) for n, x in out.items()},
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=_warps(kernel, tiles, C), num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * L * H * (2 * D * E + C * (D + E)),
            transcendentals=B * L * K * sum(tiles[n][0, 0, 0].size for n in "gh" if n in tiles),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*tiles.values(), *out.values())),
        ),
        interpret=interpret,
        name=name,
    )(tiles)


def _warps(kernel, tiles, C):
    """Enough threads that the tiles of a program stay in their registers."""
    size = max(tiles["q"].shape[3], tiles["v"].shape[3])
    if kernel in (gpu_gradients.of_features, gpu_gradients.of_values):
        by_channel = "h" in tiles or ("g" in tiles and tiles["g"].ndim == 4)
        return 8 if size > 64 or C > 16 or by_channel else 4
    return 8 if size > 64 or (size > 32 and kernel is gpu_kernels.rows) else 4


def _spec(C, G, of_query, split, name, x):
    """The block of the operand `name` that a program reads or writes; grid (N, K or H times blocks, B)."""
    block, at = _whole_spec(C, G, of_query, name, x)
    if split.blocks == 1:
        return pl.BlockSpec(block, at)
    if name not in split.axes:
        return pl.BlockSpec(block, lambda t, n, b: at(t, jax.lax.div(n, split.blocks), b))
    axis, block = split.axes[name] % x.ndim, list(block)
    block[axis] = None if block[axis] is None else block[axis] // split.blocks

    def at_block(t, n, b):
        index = list(at(t, jax.lax.div(n, split.blocks), b))
        index[axis] = jax.lax.rem(n, split.blocks)
        return tuple(index)

    return pl.BlockSpec(tuple(block), at_block)


def _whole_spec(C, G, of_query, name, x):
    """Block and index of an operand of which a program takes all channels; grid (N, K or H, B)."""
    zeros = (0,) * (x.ndim - 3)
    of_kv = (lambda h: jax.lax.div(h, G)) if of_query else (lambda h: h)
    if name == "phases":
        return (None, 4, C), lambda t, h, b: (b, 0, 0)
    if name in ("last", "current"):
        return (None, None), lambda t, h, b: (b, t)
    if name == "documents":
        return (None, C), lambda t, h, b: (b, t)
    if name in ("Z", "z", "Y", "y"):
        return (x.shape[0], None, None, None, *x.shape[4:]), lambda t, h, b: (0, b, t, of_kv(h), *zeros[1:])
    if name == "dg_share":
        return (None, C, None, None), lambda t, h, b: (b, t, h, 0)
    if name in ("k", "v", "g", "h", "dk", "dv", "dg", "dh"):
        return (None, C, None, *x.shape[3:]), lambda t, h, b: (b, t, of_kv(h), *zeros)
    return (None, C, 1 if of_query else G, *x.shape[3:]), lambda t, h, b: (b, t, h, *zeros)
