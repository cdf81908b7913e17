"""The two decode frames of cosFormer: equal to each other, to the operator, and at home at any origin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.cosformer import cosformer_attention, divide, reweighting_angle
from attnlab.attention.cosformer_states import (
    absolute_state,
    absolute_step,
    read_absolute,
    rotating_state,
    rotating_step,
    to_absolute,
    to_rotating,
)

T, EPS = 11, 1e-6
CHANNELS = np.linspace(0.05, 0.5, 5)


def features(dtype=jnp.float64):
    """fq with 4 heads, fk and v with 2."""
    rng = np.random.default_rng(0)
    shapes = ((2, T, 4, 5), (2, T, 2, 5), (2, T, 2, 3))
    return [jnp.asarray(np.abs(rng.normal(size=s)) if n < 2 else rng.normal(size=s), dtype)
            for n, s in enumerate(shapes)]  # fmt: skip


def steps(step, state, fq, fk, v, *rest):
    """Outputs [B, T, H, Dv] of one token after another, and the last state."""

    def one(state, x):
        *x, t = x
        at = (t[None, None],) if step is absolute_step else ()
        num, den, state = step(state, *(a[:, None] for a in x), *rest, *at)
        return state, divide(num, den, "clamp", EPS)[:, 0]

    xs = (*(x.swapaxes(0, 1) for x in (fq, fk, v)), 700 + jnp.arange(T))
    state, outputs = jax.lax.scan(one, state, xs)
    return outputs.swapaxes(0, 1), state


@pytest.mark.parametrize("angle", [reweighting_angle(T), CHANNELS])
def test_both_frames_step_by_step_equal_the_operator(angle):
    with jax.enable_x64(True):
        fq, fk, v = features()
        options = {"freqs": angle} if np.ndim(angle) else {"max_length": T}
        want = cosformer_attention(fq, fk, v, eps=EPS, implementation="reference", **options)
        nothing = absolute_state(0 * fk[:, :1], v[:, :1], angle, jnp.zeros((1, 1), int))
        run = jax.jit(steps, static_argnums=0)
        absolute, last = run(absolute_step, nothing, fq, fk, v, angle)
        rotating, turned = run(rotating_step, to_rotating(nothing, angle, 0), fq, fk, v, angle)
        for got in (absolute, rotating):  # the absolute one counts from 700: only differences matter
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)
        whole = absolute_state(fk, v, angle, 700 + jnp.arange(T)[None])
        for got, expected in ((last, whole), (turned, rotating_state(fk, v, angle)),
                              (to_rotating(last, angle, 700 + T), turned),
                              (to_absolute(turned, angle, 700 + T), whole)):  # fmt: skip
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-11)


def test_the_absolute_frame_stays_exact_over_many_single_steps():
    """5000 steps in float32: nothing that is added is negative, so nothing is lost; the rotating frame is near."""
    n, angle = 5000, reweighting_angle(5000)
    rng = np.random.default_rng(1)
    fk, v = np.abs(rng.normal(size=(n, 1, 1, 1, 4))), rng.normal(size=(n, 1, 1, 1, 2))
    fq = jnp.ones((1, 1, 1, 4))
    want = np.cos(angle * np.arange(n - 1, -1, -1.0)) @ fk.reshape(n, 4).sum(-1)

    def step(states, x):
        fk, v, t = x
        _, den, absolute = absolute_step(states[0], fq, fk, v, angle, t[None, None])
        _, turned, rotating = rotating_step(states[1], fq, fk, v, angle)
        return (absolute, rotating), (den[0, 0, 0], turned[0, 0, 0])

    zeros = absolute_state(
        0 * fk[0].astype(np.float32), v[0].astype(np.float32), angle, jnp.zeros((1, 1), int)
    )
    start = (zeros, to_rotating(zeros, angle, 0))
    xs = (fk.astype(np.float32), v.astype(np.float32), jnp.arange(n))
    _, (absolute, rotating) = jax.jit(lambda s, x: jax.lax.scan(step, s, x))(start, xs)
    assert abs(absolute[-1] / want - 1) < 1e-5 and abs(rotating[-1] / want - 1) < 1e-4


def test_a_memory_is_read_at_any_position():
    fq, fk, v = features(jnp.float32)
    angle = reweighting_angle(T)
    state = absolute_state(fk, v, angle, jnp.arange(T)[None])
    whole = read_absolute(state, fq, angle, jnp.arange(T)[None])
    one = read_absolute(state, fq[:, 4:5], angle, jnp.full((2, 1), 4))
    for x, y in zip(whole, one, strict=True):
        np.testing.assert_allclose(x[:, 4:5], y, atol=1e-5)
    assert np.abs(read_absolute(state, fq[:, 4:5], angle, jnp.full((2, 1), 9))[1] - one[1]).max() > 1e-2
