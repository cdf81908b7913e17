"""What every implementation of every operation must satisfy; the test file of an implementation subclasses it.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D and Dv head sizes.
"""

import zlib
from dataclasses import dataclass, field
from functools import cache, partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import masks
from kernels.masks import Mask


@dataclass(frozen=True)
class Case:
    """One call: sizes, the fields of the mask (NumPy arrays or ints) and the options of the operation."""

    T: int
    S: int
    H: int = 2
    K: int = 2
    D: int = 5
    Dv: int = 3
    B: int = 2
    mask: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    __hash__ = object.__hash__  # so that references can be cached by case


def packed(T: int, S: int, offset: int = 0, B: int = 2) -> dict:
    """Segments of packed documents, as fields of a mask: three in row 0, two between paddings in the others."""
    j = np.arange(S)
    rows = [1 + (j >= S // 3) + (j >= S // 2)]
    rows += [np.where((j < 3) | (j >= S - 4), 0, 1 + (j > S // 2))] * (B - 1)
    rows = np.stack(rows).astype(np.int32)
    return {"q_segments": rows[:, offset : offset + T], "kv_segments": rows}


def relative_error(actual, expected) -> float:
    """Largest difference over the largest expected magnitude (at least 1e-6); infinities must sit at equal places."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape} instead of {expected.shape}"
    assert np.array_equal(np.isneginf(actual), np.isneginf(expected)), "-inf in different places"
    finite = ~np.isneginf(expected)
    actual, expected = np.where(finite, actual, 0), np.where(finite, expected, 0)
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-6))


class OpContract:
    """Subclasses set `implementation` and `cases`, and say how to draw operands and how to call the operation."""

    implementation: str
    cases: dict[str, Case]
    query_operands: tuple[str, ...] = ("q",)  # of axis T; zero cotangent rows must get zero gradient
    key_operands: tuple[str, ...] = ("k", "v")  # of axis S; invisible keys must get zero gradient
    output = "o"  # of axis T: zero where a row sees nothing
    tolerance = 2e-5  # float32 against float64, relative to the array's largest value
    gradient_tolerance: float | None = None  # the same by default
    loose: dict[str, float] = {}  # case -> a larger tolerance of float32
    float64_tolerance = 1e-11
    bfloat16_tolerance = 3e-2
    zero_without_keys = True

    def operands(self, case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Float64 operands by name."""
        q = rng.normal(size=(case.B, case.T, case.H, case.D))
        k = rng.normal(size=(case.B, case.S, case.K, case.D))
        return {"q": q, "k": k, "v": rng.normal(size=(case.B, case.S, case.K, case.Dv))}

    def call(self, case: Case, implementation: str | None, operands: dict) -> dict:
        """Outputs by name."""
        raise NotImplementedError

    def mask(self, case: Case) -> Mask:
        return Mask(
            **{
                k: jnp.asarray(x) if isinstance(x, (np.ndarray, np.integer)) else x
                for k, x in case.mask.items()
            }
        )

    def draw(self, case: Case, dtype=np.float64) -> dict:
        seed = zlib.crc32(repr((case.T, case.S, case.H, case.D, sorted(case.options))).encode())
        operands = self.operands(case, np.random.default_rng(seed))
        return {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in operands.items()}

    def evaluate(self, case: Case, implementation: str | None, operands: dict):
        """Outputs, and the gradient of every float operand under fixed random cotangents of every float output."""
        floats = {n: x for n, x in operands.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        rest = {n: x for n, x in operands.items() if n not in floats}

        def loss(floats):
            outputs = self.call(case, implementation, floats | rest)
            total = 0.0
            for index, (_, x) in enumerate(sorted(outputs.items())):
                if jnp.issubdtype(x.dtype, jnp.floating):
                    cotangent = np.random.default_rng(index).normal(size=x.shape)
                    total += jnp.sum(jnp.where(jnp.isfinite(x), x, 0) * jnp.asarray(cotangent, x.dtype))
            return total, outputs

        gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(floats)
        return outputs, gradients

    @classmethod
    @cache
    def truth(cls, name: str):
        """The reference of a case in float64."""
        contract, case = cls(), cls.cases[name]
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, contract.evaluate(case, "reference", contract.draw(case)))

    def compare(self, got, want, bound: float, gradient_bound: float, what: str) -> None:
        for found, expected, limit, kind in zip(
            got, want, (bound, gradient_bound), ("output", "gradient"), strict=True
        ):
            assert set(found) == set(expected)
            for name, x in found.items():
                if expected[name].dtype.kind in "ib":
                    assert np.array_equal(x, expected[name]), f"{what} {kind} {name}"
                    continue
                error = relative_error(x, expected[name])
                assert error <= limit, f"{what} {kind} {name}: {error:.1e} > {limit:.0e}"

    def pytest_generate_tests(self, metafunc):
        """Run the tests that take `name` on every case of the subclass."""
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.cases)

    def test_outputs_and_every_gradient_match_float64(self, name):
        case, want = self.cases[name], self.truth(name)
        got = self.evaluate(case, self.implementation, self.draw(case, np.float32))
        bound = self.loose.get(name, self.tolerance)
        self.compare(got, want, bound, max(bound, self.gradient_tolerance or 0), "float32")

    @pytest.mark.thorough
    def test_in_float64_they_match_to_its_rounding(self, name):
        """Says nothing of the reference, which in float64 is what the others are compared with."""
        case, want = self.cases[name], self.truth(name)
        with jax.enable_x64(True):
            got = self.evaluate(case, self.implementation, self.draw(case))
        self.compare(got, want, self.float64_tolerance, self.float64_tolerance, "float64")

    def test_rows_read_visible_keys_only_by_exact_zeros(self, name):
        """Also: rows without a visible key are zero, and every gradient is finite."""
        case = self.cases[name]
        operands = self.draw(case, np.float32)
        seen = np.broadcast_to(masks.dense(self.mask(case), case.T, case.S), (case.B, case.T, case.S))
        row = case.T // 2
        named = {n: operands[n] for n in (*self.query_operands, *self.key_operands)}

        def one_row(named):
            y = self.call(case, self.implementation, operands | named)[self.output]
            return jnp.sum(y[:, row] * jnp.cos(jnp.arange(y[:, row].size).reshape(y[:, row].shape))), y

        gradients, y = jax.jit(jax.grad(one_row, has_aux=True))(named)
        for each, gradient in gradients.items():
            assert np.all(np.isfinite(gradient)), each
            moved = np.abs(np.asarray(gradient)).reshape(*gradient.shape[:2], -1).max(-1) > 0
            if each in self.key_operands:
                assert not np.any(moved & ~seen[:, row]), f"{each}: row {row} reads keys it must not see"
            else:
                moved[:, row] = False
                assert not moved.any(), f"{each}: row {row} reads other queries"
        if self.zero_without_keys:
            assert np.all(np.asarray(y)[~seen.any(-1)] == 0)
        if seen[:, row].any():
            assert any(np.any(np.asarray(g) != 0) for g in gradients.values())

    def chosen(self) -> Case:
        """The case of the tests below: the largest one."""
        return max(self.cases.values(), key=lambda case: (bool(case.mask), case.T))

    def test_bfloat16(self):
        case = self.chosen()
        narrow = {n: jnp.asarray(x, jnp.bfloat16) if x.dtype.kind == "f" else x
                  for n, x in self.draw(case, np.float32).items()}  # fmt: skip
        wide = {n: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for n, x in narrow.items()}
        run = jax.jit(lambda implementation, x: self.call(case, implementation, x), static_argnums=0)
        got, want = run(self.implementation, narrow)[self.output], run("reference", wide)[self.output]
        assert got.dtype == jnp.bfloat16
        assert relative_error(got, want) <= self.bfloat16_tolerance

    def test_compiled_mapped_rematerialised_and_exported_are_the_same(self):
        case = self.chosen()
        x = self.draw(case, np.float32)

        def value(x):
            return self.call(case, self.implementation, x)[self.output]

        compiled = jax.jit(value)
        y = compiled(x)
        np.testing.assert_array_equal(y, compiled(x), "a second run")
        exported = jax.export.deserialize(jax.export.export(compiled)(x).serialize())
        assert relative_error(exported.call(x), y) <= 1e-6, "exported"
        floats = {n: a for n, a in x.items() if a.dtype.kind == "f"}
        rest = {n: a for n, a in x.items() if n not in floats}
        pair = {n: jnp.stack([a, 0.5 * a]) for n, a in floats.items()}
        mapped = jax.jit(jax.vmap(lambda f: value(f | rest)))(pair)
        assert relative_error(mapped[0], y) <= self.tolerance, "mapped"

        def gradient(f, wrap):
            return jax.grad(lambda f: jnp.sum(wrap(lambda f: value(f | rest))(f) ** 2))(f)

        plain = jax.jit(partial(gradient, wrap=lambda f: f))(floats)
        again = jax.jit(partial(gradient, wrap=jax.checkpoint))(floats)
        for each in plain:
            assert relative_error(again[each], plain[each]) <= self.tolerance, f"rematerialised {each}"

    def test_numpy_operands_and_implementation_names(self):
        case = min(self.cases.values(), key=lambda case: case.T)
        x = self.draw(case, np.float32)
        got = self.call(case, self.implementation, x)[self.output]
        want = self.call(case, self.implementation, {n: jnp.asarray(a) for n, a in x.items()})[self.output]
        np.testing.assert_array_equal(got, want)
        with pytest.raises(ValueError, match="implementation='abacus' does not exist"):
            self.call(case, "abacus", x)
