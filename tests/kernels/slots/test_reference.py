"""The reference of slot attention: the contract, a hand-written loop in NumPy, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.slots import SlotState, slot_attention
from tests.kernels.slots.contract import SlotCase, SlotContract, draw


class TestReference(SlotContract):
    """It is the definition, so float32 against float64 of a few cases is enough."""

    implementation = "reference"
    cases = {name: SlotContract.cases[name] for name in ("seven", "traced_chunk")}


def by_hand(q, k, v, log_gates, window, state_key, state_value):
    """One sequence and one head, token by token, as section 2.1 writes it: o [T, Dv] and both states."""
    outputs = []
    for t in range(len(q)):
        if t >= window:
            alpha = np.exp(log_gates[t - window])[:, None]
            state_key = alpha * state_key + (1 - alpha) * k[t - window]
            state_value = alpha * state_value + (1 - alpha) * v[t - window]
        seen = slice(max(0, t - window + 1), t + 1) if window else slice(0, 0)
        logits = np.concatenate([state_key @ q[t], k[seen] @ q[t]]) / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max())
        outputs.append(weights @ np.concatenate([state_value, v[seen]]) / weights.sum())
    return np.array(outputs), state_key, state_value


def test_it_is_the_loop_written_by_hand():
    case = SlotCase(23, 23, B=1, H=1, K=1, rotated=False, state=True)
    x = draw(case, np.random.default_rng(3))
    states = x.pop("state_key"), x.pop("state_value")
    for window in (0, 1, 4, 30):
        with jax.enable_x64(True):
            o, state = slot_attention(
                **x,
                window=window,
                initial_state=SlotState(*states),
                return_state=True,
                implementation="reference",
            )
            want = by_hand(*(a[0, :, 0] for a in x.values()), window, *(a[0, 0] for a in states))
        for got, expected in zip((o[0, :, 0], state.key[0, 0], state.value[0, 0]), want, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-13)


def test_gradients_are_those_of_finite_differences():
    case, contract = SlotCase(9, 9, H=2, K=1, M=2, state=True, options={"window": 3}), SlotContract()
    x = draw(case, np.random.default_rng(4))
    with jax.enable_x64(True):

        def loss(x):
            outputs = contract.call(case, "reference", x)
            return sum(
                jnp.sum(jnp.sin(y * (n + 1)))
                for n, y in enumerate((outputs["o"], outputs["key"], outputs["value"]))
            )

        gradients = jax.jit(jax.grad(loss))(x)
        value = jax.jit(loss)
        for n, (name, array) in enumerate(x.items()):
            direction = np.random.default_rng(n).normal(size=array.shape)
            nudged = [value(x | {name: array + step * direction}) for step in (1e-5, -1e-5)]
            slope = (nudged[0] - nudged[1]) / 2e-5
            np.testing.assert_allclose(jnp.sum(gradients[name] * direction), slope, rtol=1e-6, err_msg=name)
