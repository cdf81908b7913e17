"""Linear attention with time split over devices: a carried state, or rows alone. See `kernels.sequence`.

Letters: B batch, T queries, S keys of a shard, K key/value heads, D head size, E columns of a state Z [B, K, D, E]. A
shard turns a state by its length, decays it, drops it where another document ends the shard, and adds its own keys:

    Z <- through e^{i angle S} Z [same document] + Z of the shard alone
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels import sequence
from kernels.linear import decays, states
from kernels.linear.arguments import Arguments, State
from kernels.sequence import Axis, Exchange


def carried(operation, arguments: Arguments, axis: Axis):
    """Numerator and denominator of this device's rows, and the state after the last key of all."""
    a, S = arguments, arguments.k.shape[1]
    empty = jax.tree.map(jnp.zeros_like, State(a.state.real, a.state.imag))
    own = {
        "state": states.append(dataclasses.replace(a, state=State(empty.real, empty.imag, a.state.segment))),
        "key": None if a.key_decay is None else decays.through(a.key_decay)[..., None],
        "value": None if a.value_decay is None else decays.through(a.value_decay)[:, :, None],
    }

    def combine(state, shard):
        new, factor = shard["state"], 1
        for each in (shard["key"], shard["value"]):
            factor = factor if each is None else factor * each
        if new.segment is not None:
            factor = factor * (new.segment == state.segment)[:, None, None, None]
        turned = states.turn(state, a.angle, S)
        imag = None if turned.imag is None else turned.imag * factor + new.imag
        return State(turned.real * factor + new.real, imag, new.segment)

    state = sequence.exclusive(own, a.state, combine, axis)
    num, den, state = operation(dataclasses.replace(a, state=state, given_state=True))
    return num, den, sequence.last(state, axis)


def rows_only(operation, arguments: Arguments, axis: Axis):
    """Rows of this device over all keys; they no longer stand beside their own keys."""
    return sequence.rows_only(operation, dataclasses.replace(arguments, aligned=False), axis)


def _in_place(arguments, size):
    return arguments.mask.causal and arguments.aligned and arguments.allowed is None


EXCHANGES = (Exchange(carried, _in_place), Exchange(rows_only, letters="t"))
