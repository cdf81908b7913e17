"""Slot attention by the kernels of its parts, on TPU and GPU: two gated linear attentions and a windowed softmax.

Letters: B batch, T rows (queries), H query heads, K key/value heads, D, Dv head sizes, M slots; primes mark tokens as
they enter the slots, delayed by the shift, with s' = 1 - exp(g').

    u = scale (gated linear attention of queries q, keys k' and values s', decaying g' in every value channel)
    o = gated linear attention of queries p = softmax(u), keys s' and values v', decaying g' in every key channel

The states are those of the slots, so memory between chunks is all there is; u and p are [B, T, H, M]. The window is
`kernels.forgetting`, joined by the two log-sum-exps. Each part has its own gradient. Documents that restart from the
initial state have its share added outside: the linear operation restarts from zero.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import pallas
from kernels.linear import State, linear_attention
from kernels.linear.gpu import LARGEST
from kernels.linear.tpu import CHANNELS
from kernels.masks import Mask
from kernels.slots.arguments import Arguments, SlotState
from kernels.slots.blockwise import joined_with_window, softmax_of_slots
from kernels.slots.rows import delay, find_rows

_einsum = partial(jnp.einsum, precision="highest")


def tpu(arguments: Arguments):
    """What `blockwise.blockwise` returns, by TPU kernels."""
    return _of_parts(arguments, "pallas_tpu", "tpu")


def gpu(arguments: Arguments):
    """What `blockwise.blockwise` returns, by GPU kernels."""
    return _of_parts(arguments, "pallas_gpu", "cuda")


def why_not_on_tpu(arguments: Arguments) -> str | None:
    if arguments.accumulator == jnp.float64:
        return "float64 is not a TPU's; cast the operands to float32, or use 'blockwise'"
    return _too_wide({name: size for name, size in _sizes(arguments).items() if name != "Dw"}, CHANNELS)


def why_not_on_gpu(arguments: Arguments) -> str | None:
    if arguments.accumulator == jnp.float64:
        return "it sums in float32, and the operands are float64; cast them, or use 'blockwise'"
    return _too_wide(_sizes(arguments), LARGEST)


def _sizes(a):
    """Channels of each part: queries and keys, values, slots, queries and keys of the window."""
    return {"D": a.q.shape[3], "Dv": a.v.shape[3], "M": a.log_gates.shape[3], "Dw": a.q_window.shape[3]}


def _too_wide(sizes, largest):
    wide = [f"{name}={size}" for name, size in sizes.items() if size > largest]
    return f"{', '.join(wide)} exceeds its tiles of {largest}; use 'blockwise'" if wide else None


def _of_parts(arguments, implementation, platform):
    # The parts are named, for a platform that need not be the one of this machine.
    with pallas.compiling_for(platform):
        o, lse, state = _slots(arguments, implementation)
        return joined_with_window(arguments, o, lse, state, implementation)


def _slots(arguments, implementation):
    """Softmax over the slots alone: o [B, T, H, Dv] and lse [B, T, H] in float32; the last state."""
    a, rows, dtype = arguments, find_rows(arguments), arguments.q.dtype
    entering = rows.enters[:, :, None, None]
    k, v, g = (jnp.where(entering, delay(x, a), 0) for x in (a.k, a.v, a.log_gates))
    write = -jnp.expm1(g)  # zero where nothing enters; expm1 is exact for slow gates
    # A row of padding still lets tokens enter, so it keeps its document's number here.
    documents = None if a.mask.q_segments is None else 1 + jnp.cumsum(rows.begins, axis=1, dtype=jnp.int32)
    attend = partial(
        linear_attention, mask=Mask(q_segments=documents, kv_segments=documents), denominator=False,
        return_state=True, implementation=implementation,
    )  # fmt: skip
    again = None if a.document_state == "zero" or documents is None else _restarts(rows.begins, g)
    start = a.state.key.swapaxes(2, 3), a.state.value
    of_heads = lambda x, axis: jnp.repeat(x, a.q.shape[2] // a.k.shape[2], axis=axis)  # noqa: E731
    u, _, key = attend(a.q, k, write.astype(dtype), log_value_decay=g, initial_state=State(start[0]))
    if again is not None:
        u = u + _einsum("bthd,bhdm->bthm", _wide(a.q), of_heads(start[0], 1)) * of_heads(again, 2)
    p, lse = softmax_of_slots(a.scale * u, rows.shown[:, :, None])
    o, _, value = attend(
        p.astype(dtype), write.astype(dtype), v, log_key_decay=g, initial_state=State(start[1])
    )
    key, value = key.real.swapaxes(2, 3), value.real
    if again is not None:
        o = o + _einsum("bthm,bhmv->bthv", p * of_heads(again, 2), of_heads(start[1], 1))
        last = again[:, -1, :, :, None]
        key, value = key + last * a.state.key, value + last * a.state.value
    return o, lse, SlotState(key, value, rows.written[:, -1])


def _restarts(begins, g):
    """What is left at each row of the state its document began with, [B, T, K, M]; 0 in the first document."""

    def join(one, two):
        return one[0] | two[0], jnp.where(two[0], two[1], one[1] + two[1])

    begins = begins[:, :, None, None]
    later, sums = jax.lax.associative_scan(join, (jnp.broadcast_to(begins, g.shape), g), axis=1)
    return jnp.where(later, jnp.exp(sums), 0)


def _wide(x):
    return x.astype(jnp.float32)
