"""Shape-checked signatures: what passes, what is converted, and what the refusals say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.signatures import Array, Float, Int, checked


@checked
def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    starts: Int[Array, " B"] | None = None,
    slopes: Float[Array, " H"] | float = 1.0,
    *,
    scale: float = 1.0,
):
    assert isinstance(q, jax.Array) and isinstance(k, jax.Array)
    return q * scale, starts, slopes


Q, K = np.ones((2, 5, 3, 4), np.float32), np.ones((2, 7, 1, 4), np.float32)


def test_array_likes_become_arrays_and_plain_numbers_stay():
    q, starts, slopes = attend(Q, K, starts=[0, 3], slopes=2.0, scale=0.5)
    assert q.shape == (2, 5, 3, 4) and float(q[0, 0, 0, 0]) == 0.5
    assert starts.dtype == jnp.int32 and slopes == 2.0
    assert attend(Q, K)[1] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q, K[..., :3]), r"attend: k is float32\[2, 7, 1, 3\], expected Float\[B S K D\] with B=2, D=4"),
        ((Q, K[:1]), r"k is float32\[1, 7, 1, 4\].* with B=2, D=4"),
        ((Q.astype(int), K), r"q is int32\[2, 5, 3, 4\], expected Float\[B T H D\]$"),
        ((Q[0], K), r"q is float32\[5, 3, 4\]"),
        ((Q, K, np.zeros(3, int)), r"starts is int32\[3\], expected Int\[B\] with B=2"),
        ((Q, K, np.zeros(2)), r"starts is float32\[2\]"),
        ((Q, K, None, np.zeros(2)), r"slopes is float32\[2\], expected Float\[H\] with H=3"),
    ],
)
def test_what_does_not_fit_is_named_with_its_shape(arguments, message):
    with pytest.raises(ValueError, match=message):
        attend(*arguments)


def test_each_call_binds_its_own_letters():
    attend(Q, K)
    assert attend(Q[:1], K[:1])[0].shape[0] == 1


def test_tracers_are_checked_too():
    assert jax.jit(attend)(Q, K)[0].shape == Q.shape
    assert jax.vmap(attend)(Q[None], K[None])[0].shape == Q[None].shape
    with pytest.raises(ValueError, match="k is float32"):
        jax.jit(attend)(Q, K[..., :2])


def test_python_arguments_are_still_pythons_business():
    with pytest.raises(TypeError, match="missing a required argument: 'k'"):
        attend(Q)
