"""The feed-forward layer by hand, and its width rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.models.mlp import SwiGLU, swiglu_size


@pytest.mark.parametrize(
    ("hidden", "ratio", "size"), [(768, 4, 2048), (768, 3.5, 1792), (1024, 4, 2816), (1536, 3.5, 3584)]
)
def test_width_rule_gives_the_papers_sizes(hidden, ratio, size):
    assert swiglu_size(hidden, ratio) == size


def test_by_hand():
    params = {
        name: {"kernel": jnp.ones(shape)}
        for name, shape in {"gate": (2, 3), "up": (2, 3), "down": (3, 2)}.items()
    }
    y = SwiGLU(3).apply({"params": params}, jnp.array([[[1.0, -3.0]]]))
    silu = -2 / (1 + np.exp(2.0))
    np.testing.assert_allclose(y, np.full((1, 1, 2), 3 * silu * -2), rtol=1e-6)


def test_activations_follow_dtype_and_parameters_do_not():
    params = SwiGLU(3, dtype=jnp.bfloat16).init(jax.random.key(0), jnp.zeros((1, 1, 2)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert SwiGLU(3, dtype=jnp.bfloat16).apply(params, jnp.ones((1, 1, 2))).dtype == jnp.bfloat16
