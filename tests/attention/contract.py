"""What every mixer must do, whatever its paper: one class of tests, run on every variant of every mixer.

Letters: B batch, T length, C channels. Sizes are primes or near them, so that swapped axes cannot pass.
"""

import dataclasses
import functools

import jax
import jax.export
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
    """Subclasses set `name`, and `variants` (id -> options) with the decorator below."""

    name: str
    variants: dict[str, dict]
    once = (
        "test_repeated_mapped_rematerialised_and_exported_are_the_same",
        "test_a_named_implementation_is_taken_or_refused_in_every_form",
    )  # run on the first variant only: what JAX's transformations do does not depend on the options
    tolerance = 2e-5  # of float32
    flops_options: dict = {
        "implementation": "reference",
        "head_dim": 128,
        "window": 0,
    }  # the dense form: every pair
    flops_excess = 1.06  # what the compiler counts over the formula; the rest is elementwise
    endless = False  # whether the cache has no end whatever its options (a rolling one never has)

    def pytest_generate_tests(self, metafunc):
        """Run every test on every variant; all but the first are for the thorough run."""
        if "options" in metafunc.fixturenames:
            chosen = list(self.variants.items())[: 1 if metafunc.function.__name__ in self.once else None]
            marks = [(), *[pytest.mark.thorough] * (len(chosen) - 1)]
            metafunc.parametrize(
                "options",
                [
                    pytest.param(options, id=name, marks=mark)
                    for (name, options), mark in zip(chosen, marks, strict=True)
                ],
            )

    def test_parallel_equals_prefill_and_steps(self, options):
        module, params = build(self.name, **options)
        x = inputs()
        want = apply(module, params, x)
        for pieces in ((9, 1, 1, 12), (1, 12, 1, 9)):
            got, _ = decode(module, params, x, pieces)
            self.near(got, want, f"{pieces}")

    def near(self, got, want, what=""):
        np.testing.assert_allclose(got, want, atol=self.tolerance, rtol=self.tolerance, err_msg=what)

    def test_any_split_of_any_length_is_the_same(self, options):
        """One token alone, and a random split of 7 (longer ones are the operations' business)."""
        module, params = build(self.name, **options)
        for length, pieces in ((1, (1,)), (7, _random_split(7, np.random.default_rng(len(repr(options)))))):
            x = inputs(length)
            self.near(decode(module, params, x, pieces)[0], apply(module, params, x), f"{pieces}")

    def test_outputs_and_every_gradient_match_the_reference_in_float64(self, options):
        module, params = build(self.name, **options)
        x = inputs()

        def evaluate(module, params, x):
            def loss(params, x):
                y = module.apply(params, x, positions=jnp.arange(T)[None])
                return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

            return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

        got_gradients, got = evaluate(module, params, x)
        with jax.enable_x64(True):
            wide, _ = build(self.name, dtype=jnp.float64, implementation="reference", **options)
            widen = lambda tree: jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)  # noqa: E731
            want_gradients, want = evaluate(wide.clone(param_dtype=jnp.float64), widen(params), widen(x))
            want, want_gradients = np.asarray(want), jax.tree.map(np.asarray, want_gradients)
        self.near(got, want)
        for (name, found), expected in zip(
            named_leaves(got_gradients).items(), named_leaves(want_gradients).values(), strict=True
        ):
            bound = 5 * self.tolerance * max(np.abs(expected).max(), 1e-3)
            assert np.abs(found - expected).max() <= bound, f"gradient of {name}"

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
        self.near(packed, alone)

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
            self.near(got[row, start:], want[row], f"parallel, {start} pads")
            self.near(stepped[row, start:], want[row], f"in steps, {start} pads")

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
        if self.endless or getattr(module.config, "window", 0):
            x = inputs(length=14)  # what has no end goes on past the length asked for
            self.near(decode(module, params, x, (6, 8), length=9)[0], apply(module, params, x))
            return
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

    def test_repeated_mapped_rematerialised_and_exported_are_the_same(self, options):
        module, params = build(self.name, **options)
        x = inputs()
        y = apply(module, params, x)
        np.testing.assert_array_equal(apply(module, params, x), y, "a second run")
        call = functools.partial(module.apply, params, positions=jnp.arange(T)[None])
        mapped = jax.jit(jax.vmap(call))(jnp.stack([x, 0.5 * x]))
        self.near(mapped[0], y, "mapped")
        exported = jax.export.deserialize(jax.export.export(jax.jit(call))(x).serialize())
        self.near(exported.call(x), y, "exported")
        gradient = jax.grad(lambda x, call: jnp.sum(jnp.sin(call(x))))
        again = jax.jit(lambda x: gradient(x, jax.checkpoint(call)))(x)
        self.near(again, jax.jit(lambda x: gradient(x, call))(x), "rematerialised")

    def test_state_size_formula_matches_the_cache(self, options):
        module, _ = build(self.name, **options)
        for length in (1, 19, 40):
            cache = jax.eval_shape(functools.partial(module.init_cache, 2, length))
            counters = 2 + 1  # starts [2] and length []
            numbers = sum(leaf.size for leaf in jax.tree.leaves(cache)) - counters
            assert 2 * module.state_size(module.config, length) == numbers

    def test_flops_formula_matches_the_compiler(self, options):
        wanted = {
            k: v
            for k, v in self.flops_options.items()
            if k in find_mixer(self.name).Config.__dataclass_fields__
        }
        module, params = build(self.name, channels=128, **(options | wanted))
        x = jnp.zeros((B, T, 128))
        call = jax.jit(lambda p, x: module.apply(p, x, positions=jnp.arange(T)[None]))
        counted = call.lower(params, x).compile().cost_analysis()["flops"] / (B * T)
        formula = module.forward_flops(module.config, 128, visible=T)
        assert 1 <= counted / formula < self.flops_excess, (
            f"{counted:.0f} counted, {formula:.0f} by the formula"
        )


def _random_split(total: int, rng: np.random.Generator) -> tuple[int, ...]:
    cuts = np.flatnonzero(rng.random(total - 1) < 0.5) + 1
    return tuple(int(n) for n in np.diff([0, *cuts, total]))


def variants(**named_options):
    """Class decorator: run the contract on each of the named option sets."""

    def set_variants(cls):
        cls.variants = named_options
        return cls

    return set_variants
