"""AMSGrad as PyTorch computes it: steps by hand, and what tells it from optax's."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.training.amsgrad import torch_amsgrad

GRADIENTS = ([4.0, -1.0], [0.5, 2.0], [-0.1, 0.3])


def directions(optimizer):
    params = {"w": jnp.zeros(2)}
    state = optimizer.init(params)
    found = []
    for gradient in GRADIENTS:
        direction, state = optimizer.update({"w": jnp.array(gradient)}, state, params)
        found.append(np.asarray(direction["w"]))
    return found


@pytest.mark.parametrize("options", [{}, {"b1": 0.5}, {"b2": 0.8}, {"eps": 0.1}], ids=str)
def test_three_steps_by_hand(options):
    b1, b2, eps = ({"b1": 0.9, "b2": 0.999, "eps": 1e-8} | options).values()
    m = v = u = np.zeros(2)
    for t, (got, gradient) in enumerate(zip(directions(torch_amsgrad(**options)), GRADIENTS, strict=True), 1):
        g = np.array(gradient)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = np.maximum(u, v)
        np.testing.assert_allclose(got, m / (1 - b1**t) / (np.sqrt(u / (1 - b2**t)) + eps), rtol=2e-5)


def test_it_is_neither_adam_nor_the_amsgrad_of_optax():
    options = {"b2": 0.8}
    ours = directions(torch_amsgrad(**options))[-1]
    for other in (optax.scale_by_adam(**options), optax.scale_by_amsgrad(**options)):
        assert np.abs(directions(other)[-1] - ours).max() > 1e-2
