"""cosFormer over another sequence: lengths and widths, masks, a state built once, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.cosformer import CosformerConfig
from attnlab.attention.cosformer_cross import CrossCosformerAttention

C = 12


@functools.cache
def build(causal=False, kdim=7, vdim=5, **options):
    config = CosformerConfig(num_heads=4, num_kv_heads=2, head_dim=3, **options).resolve(4, 2, 3, C)
    module = CrossCosformerAttention(config=config, hidden_size=C, causal=causal)
    x = (jnp.zeros((1, 2, C)), jnp.zeros((1, 2, kdim)), jnp.zeros((1, 2, vdim)))
    return module, jax.jit(module.init)(jax.random.key(1), *x)


@functools.partial(jax.jit, static_argnames=("module", "method"))
def run(module, params, *args, method="__call__", **kwargs):
    return module.apply(params, *args, method=method, **kwargs)


def draw(T=5, S=9, kdim=7, vdim=5):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, n, d)), jnp.float32) for n, d in ((T, C), (S, kdim), (S, vdim))]


@pytest.mark.parametrize(("T", "S"), [(5, 9), (3, 1)])
def test_a_state_built_once_equals_the_full_form(T, S):
    module, params = build(max_length=9)
    query, key, value = draw(T, S)
    keys = np.arange(S) < np.array([[S], [3]])
    want = run(module, params, query, key, value, key_mask=keys)
    state = run(module, params, key, value, key_mask=keys, method="memory")
    for t in range(T):
        got = run(module, params, query[:, t : t + 1], state, jnp.array([[t]]), method="read")
        np.testing.assert_allclose(got, want[:, t : t + 1], atol=1e-5)
    assert np.all(np.isnan(run(module, params, query[:, :1], state, jnp.array([[9]]), method="read")))


def test_values_default_to_keys_and_keys_to_queries():
    module, params = build(m_mode="length", kdim=C, vdim=C)
    query, key, _ = draw(kdim=C)
    np.testing.assert_array_equal(run(module, params, query, key), run(module, params, query, key, key))
    np.testing.assert_array_equal(run(module, params, query), run(module, params, query, query, query))


def test_a_length_a_row_is_that_of_its_keys():
    module, params = build(m_mode="per_sequence", kdim=C, vdim=C)
    x = draw(T=9)[0]
    keys = np.arange(9) < np.array([[9], [4]])
    got = run(module, params, x, key_mask=keys)
    same, _ = build(m_mode="length", kdim=C, vdim=C)
    np.testing.assert_allclose(got[1:, :4], run(same, params, x[1:, :4]), atol=1e-5)


def test_causal_rows_see_nothing_later():
    module, params = build(causal=True, m_mode="length", kdim=C, vdim=C)
    x = draw(T=9)[0]
    moved = run(module, params, x.at[:, 6:].add(1.0)) - run(module, params, x)
    assert np.all(np.asarray(moved)[:, :6] == 0) and np.all(np.abs(moved).max((0, 2))[6:] > 0)


def test_what_has_no_meaning_is_refused():
    causal, params = build(causal=True, m_mode="length")
    with pytest.raises(ValueError, match="causal attention needs equal lengths, got 5 queries and 9 keys"):
        run(causal, params, *draw())
    short, params = build(max_length=8)
    with pytest.raises(ValueError, match="9 positions pass max_length=8"):
        run(short, params, *draw())
    free, params = build(m_mode="length")
    with pytest.raises(
        ValueError, match="a state needs m_mode='fixed' and causal=False, got m_mode='length'"
    ):
        run(free, params, *draw()[1:], method="memory")
