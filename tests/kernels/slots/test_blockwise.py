"""Blockwise slot attention: the contract, its chunks, its memory, and gates and logits at their extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.slots import ChunkSizes, slot_attention
from tests.kernels.contract import relative_error
from tests.kernels.slots.contract import SlotCase, SlotContract, draw


class TestBlockwise(SlotContract):
    implementation = "blockwise"


@pytest.mark.thorough
def test_any_chunk_sizes_give_the_same():
    contract, results = SlotContract(), []
    with jax.enable_x64(True):
        for sizes in (ChunkSizes(1, 1), ChunkSizes(9, 3), None):
            case = SlotCase(37, 37, H=4, state=True, options={"window": 3, "chunk_sizes": sizes})
            results.append(contract.evaluate(case, "blockwise", draw(case, np.random.default_rng(0))))
        for n, got in enumerate(results[:-1]):
            contract.compare(got, results[-1], 1e-12, 1e-12, f"sizes {n}")


def test_memory_is_linear_in_the_length():
    """Temporaries of forward and backward grow with T, also when the window is everything."""

    def temporaries(T):
        x, g = (
            jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32),
            jax.ShapeDtypeStruct((1, T, 2, 4), jnp.float32),
        )

        def loss(q, k, v, g):
            return jnp.sum(slot_attention(q, k, v, g, window=T, implementation="blockwise") ** 2)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(x, x, x, g).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(1024), temporaries(4096)
    assert large < 4.5 * small and large < 4096 * 4096


def test_extreme_gates_and_logits_stay_finite_and_right():
    """Gate logits of +-60 (log gates from -60 to -1e-26) and attention logits of +-80 at once, in float32."""
    case = SlotCase(71, 71, D=4, M=4, rotated=False, options={"window": 5})
    x = draw(case, np.random.default_rng(1))
    x["log_gates"] = -np.logaddexp(
        0, -60 * np.sign(np.random.default_rng(2).normal(size=x["log_gates"].shape))
    )
    x["q"] *= 80 / np.abs(x["q"]).max()
    contract = SlotContract()
    narrow = {name: a.astype(np.float32) for name, a in x.items()}
    outputs, gradients = contract.evaluate(case, "blockwise", narrow)
    with jax.enable_x64(True):
        wide = {name: a.astype(np.float64) for name, a in narrow.items()}
        want, want_gradients = contract.evaluate(case, "reference", wide)
    for name, y in (outputs | gradients).items():
        assert np.all(np.isfinite(y)), name
    assert relative_error(outputs["o"], want["o"]) < 1e-4
    for name in gradients:
        assert relative_error(gradients[name], want_gradients[name]) < 1e-3, name


def test_strong_gates_lose_no_digits_of_weak_ones_after_them():
    """Sums of log gates are never subtracted: after gates of exp(-1e6) the decay of the next tokens is still exact."""
    T = 16
    g = np.full((1, T, 1, 1), -0.01)
    g[0, :8] = -1e6
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(1, T, 1, 3)) for _ in range(3))
    with jax.enable_x64(True):
        _, want = slot_attention(q, k, v, g, window=0, return_state=True, implementation="reference")
        want = np.asarray(want.value)
    narrow = [x.astype(np.float32) for x in (q, k, v, g)]
    _, got = slot_attention(*narrow, window=0, return_state=True, implementation="blockwise")
    assert relative_error(got.value, want) < 1e-6
