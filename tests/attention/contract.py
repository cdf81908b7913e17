"""What every mixer must do, whatever its paper: one class of tests, run on every variant of every mixer.

Letters: B batch, T length, C channels. Sizes are primes or near them, so that swapped axes cannot pass.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.mixer import find_mixer
from attnlab.training.trees import named_leaves

B, T, C = 3, 23, 22


@functools.cache
def build(name: str, dtype=jnp.float32, channels: int = C, **options):
    """The mixer `name` with 2 heads of 10 (or as options say), and seeded parameters."""
    cls = find_mixer(name)
    defaults = {"num_heads": 2, "head_dim": 10} | options
    config = cls.Config(**defaults).resolve(2, 0, 10, channels)
    module = cls(config=config, hidden_size=channels, init_std=0.3, dtype=dtype)
    x, positions = jnp.zeros((1, 2, channels), dtype), jnp.zeros((1, 2), jnp.int32)
    twin = module.clone(
        config=dataclasses.replace(config, implementation="")
    )  # same parameters, whatever the kernel
    return module, jax.jit(twin.init)(jax.random.key(1), x, positions=positions)


def inputs(length: int = T, batch: int = B, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, length, C))


# Modules are hashable, so equal calls in different tests share one compiled program.
@functools.partial(jax.jit, static_argnums=0)
def _apply(module, params, x, context):
    return module.apply(params, x, **context)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _append(module, method, params, x, cache):
    return module.apply(params, x, cache, method=method)


def apply(module, params, x, **context):
    context.setdefault("positions", jnp.arange(x.shape[1])[None])
    return _apply(module, params, x, context)


def decode(module, params, x, pieces, length=None, starts=None):
    """Feed x through the cache in pieces; returns the outputs side by side, and the last cache."""
    cache = module.init_cache(x.shape[0], length or x.shape[1], starts)
    outputs, at = [], 0
    for size in pieces:
        method = "step" if size == 1 else "prefill"
        y, cache = _append(module, method, params, x[:, at : at + size], cache)
        outputs.append(y)
        at += size
    return jnp.concatenate(outputs, axis=1), cache


class MixerContract:
    """Subclasses set `name` and `variants` (id -> options) with the decorator below."""

    name: str

    def test_parallel_equals_prefill_and_steps(self, options):
        module, params = build(self.name, **options)
        x = inputs()
        want = apply(module, params, x)
        for pieces in ((9, 1, 1, 12), (1, 12, 1, 9)):
            got, _ = decode(module, params, x, pieces)
            np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5, err_msg=f"{pieces}")

    def test_causality_and_isolation_by_exact_zeros(self, options):
        module, params = build(self.name, **options)
        x = inputs()
        segments = jnp.array([[1] * 8 + [2] * 11 + [0] * 4] * B)
        positions = jnp.concatenate([jnp.arange(8), jnp.arange(11), jnp.arange(4)])[None]

        def output_at(x, t):
            y = module.apply(params, x, positions=positions, segments=segments)
            return jnp.sum(jax.lax.dynamic_index_in_dim(y, t, 1))

        gradient = jax.jit(jax.grad(output_at))
        for t in (0, 5, 8, 14):
            reach = np.abs(gradient(x, t)).max(axis=(0, 2))
            start = 0 if t < 8 else 8
            assert np.all(reach[:start] == 0) and np.all(reach[t + 1 :] == 0), (
                f"row {t} sees {np.nonzero(reach)}"
            )
            assert reach[t] > 0

    def test_packed_documents_equal_documents_alone(self, options):
        module, params = build(self.name, **options)
        x = inputs()
        segments = jnp.array([[1] * 11 + [2] * 12] * B)
        positions = jnp.concatenate([jnp.arange(11), jnp.arange(12)])[None]
        packed = apply(module, params, x, positions=positions, segments=segments)
        alone = jnp.concatenate([apply(module, params, x[:, :11]), apply(module, params, x[:, 11:])], axis=1)
        np.testing.assert_allclose(packed, alone, atol=2e-5, rtol=2e-5)

    def test_left_padding_is_invisible(self, options):
        module, params = build(self.name, **options)
        starts = jnp.array([0, 11, T - 1])
        real = jnp.arange(T)[None] >= starts[:, None]
        x = jnp.where(real[..., None], inputs(), 1e3 * inputs(seed=5))  # garbage in the padding
        got = apply(module, params, x, positions=jnp.arange(T)[None] - starts[:, None], starts=starts)
        stepped, _ = decode(module, params, x, (9, 1, 1, 12), starts=starts)
        want = [
            apply(module, params, x)[0],
            *(apply(module, params, x[:, s:])[i] for i, s in ((1, 11), (2, T - 1))),
        ]
        for row, start in enumerate(starts):
            np.testing.assert_allclose(got[row, start:], want[row], atol=3e-5, rtol=3e-5)
            np.testing.assert_allclose(stepped[row, start:], want[row], atol=3e-5, rtol=3e-5)

    def test_padding_gradients_are_zero_and_all_are_finite(self, options):
        module, params = build(self.name, **options)
        starts = jnp.array([0, 4, T])  # the last row is all padding
        x, weights = inputs(), jnp.arange(T)[None] >= starts[:, None]

        def loss(params, x):
            y = module.apply(params, x, positions=jnp.arange(T)[None] - starts[:, None], starts=starts)
            return jnp.sum(jnp.where(weights[..., None], jnp.sin(y), 0))

        of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
        for name, gradient in named_leaves(of_params).items():
            assert np.all(np.isfinite(gradient)), name
            assert np.any(gradient != 0), f"{name} has no gradient"
        assert np.all(np.where(weights[..., None], 0, of_x) == 0) and np.all(np.isfinite(of_x))

    def test_overflowing_a_cache_is_not_silent(self, options):
        module, params = build(self.name, **options)
        if getattr(module.config, "window", 0):
            return  # a rolling cache has no end
        with pytest.raises(ValueError, match="do not fit a cache of 7"):
            decode(module, params, inputs(length=9), (9,), length=7)
        got, _ = decode(module, params, inputs(length=2), (1, 1), length=1)
        assert np.all(np.isfinite(got[:, 0])) and np.all(np.isnan(got[:, 1]))

    def test_a_named_implementation_is_taken_or_refused_in_every_form(self, options):
        module, params = build(self.name, implementation="abacus", **options)
        calls = {
            "parallel": lambda: apply(module, params, inputs()),
            "prefill": lambda: decode(module, params, inputs(), (T,)),
            "step": lambda: decode(module, params, inputs(length=1), (1,)),
        }
        for form, call in calls.items():
            with pytest.raises(ValueError, match="implementation='abacus' does not exist"):
                call()
                pytest.fail(f"{form} ignores it")

    def test_bfloat16_stays_close(self, options):
        wide, params = build(self.name, **options)
        narrow, _ = build(self.name, dtype=jnp.bfloat16, **options)
        x = inputs().astype(jnp.bfloat16)
        got = apply(narrow, params, x)
        want = apply(wide, params, x.astype(jnp.float32))
        assert got.dtype == jnp.bfloat16
        error = np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()
        assert error < 3e-2

    def test_repetition_gives_the_same_bits(self, options):
        module, params = build(self.name, **options)
        np.testing.assert_array_equal(apply(module, params, inputs()), apply(module, params, inputs()))

    def test_flops_formula_matches_the_compiler(self, options):
        sizes = {"head_dim": 128, "channels": 128, "window": 0}  # the dense form computes every pair
        module, params = build(self.name, implementation="reference", **(options | sizes))
        x = jnp.zeros((B, T, 128))
        call = jax.jit(lambda p, x: module.apply(p, x, positions=jnp.arange(T)[None]))
        counted = call.lower(params, x).compile().cost_analysis()["flops"] / (B * T)
        formula = module.forward_flops(module.config, 128, visible=T)
        assert 1 <= counted / formula < 1.06  # the rest is elementwise


def variants(**named_options):
    """Class decorator: run every test of the contract on each of the named option sets."""
    values = [pytest.param(options, id=name) for name, options in named_options.items()]
    return pytest.mark.parametrize("options", values)
