"""The shared contract for forgetting attention, with its gates; each test file of an implementation subclasses it.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D and Dv head sizes.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting import BlockSizes, Mask, forgetting_attention
from tests.kernels import contract
from tests.kernels.contract import packed

NAMES = ("q", "k", "v", "log_f")
SMALL = BlockSizes(16, 8)


def known(option, value):
    """Whether this version's compiler has the option."""
    try:
        jax.jit(lambda x: x, compiler_options={option: value})(0.0)
    except jax.errors.JaxRuntimeError:
        return False
    return True


# These programs run once on tiny arrays: compiling them well would take most of the time.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
jit = partial(
    jax.jit, compiler_options={option: value for option, value in QUICK.items() if known(option, value)}
)


@dataclass(frozen=True)
class Case(contract.Case):
    """A call, with or without gates."""

    gated: bool = True
    __hash__ = object.__hash__


CASES = {
    "one": Case(1, 1),
    "seven": Case(7, 7, H=3, K=3),
    "sixty_three": Case(63, 63, H=6, K=2, D=7, Dv=11, options={"block_sizes": SMALL}),
    "default_blocks": Case(111, 111, D=13),
    "traced_decode": Case(1, 63, H=3, K=1, mask={"q_offset": np.int32(40), "lengths": np.array([41, 41], np.int32)}),
    "traced_chunk": Case(7, 63, mask={"q_offset": np.int32(29)}, options={"block_sizes": BlockSizes(3, 8)}),
    "window": Case(19, 111, mask={"q_offset": 92, "window": 37}, options={"block_sizes": BlockSizes(8, 16)}),
    "segments": Case(63, 63, H=4, K=2, mask=packed(63, 63), options={"block_sizes": SMALL}),
    "segment_chunk": Case(17, 63, mask={"q_offset": 40, **packed(17, 63, 40)}, options={"block_sizes": SMALL}),
    "empty_rows": Case(19, 45, B=3, mask={"q_offset": 26, "starts": np.array([7, 33, 45], np.int32)}),
    "lengths": Case(31, 31, mask={"lengths": np.array([5, 31], np.int32)}, options={"block_sizes": SMALL}),
    "global": Case(63, 63, options={"block_sizes": SMALL, "decay_mode": "global"}),
    "no_gates": Case(31, 7, gated=False, H=6, K=3, options={"block_sizes": SMALL, "scale": 0.7}),
    "no_gates_all_keys": Case(7, 31, gated=False, mask={"causal": False, "lengths": np.array([31, 19], np.int32)}),
    "pruned": Case(35, 63, H=4, K=2, mask={"q_offset": 28, "starts": np.array([0, 11], np.int32)},
                   options={"block_sizes": SMALL, "acp_threshold": np.array([[-2.0, -4.0, -6.0, -8.0]])}),
}  # fmt: skip


def operands(case, dtype=np.float64, seed=0):
    """q, k, v, log_f (None without gates) and cotangents of o and lse, drawn once per case."""
    r = np.random.default_rng(seed)
    B, T, S, H, K = case.B, case.T, case.S, case.H, case.K
    q, k = r.normal(size=(B, T, H, case.D)), r.normal(size=(B, S, K, case.D))
    v, do, dlse = (
        r.normal(size=(B, S, K, case.Dv)),
        r.normal(size=(B, T, H, case.Dv)),
        r.normal(size=(B, T, H)),
    )
    log_f = -np.log1p(np.exp(-r.normal(1.0, 2.0, size=(B, S, H))))
    return [x.astype(dtype) for x in (q, k, v)] + [log_f.astype(dtype) if case.gated else None], (do, dlse)


def attend(case, implementation, arrays):
    """(o, lse) of one implementation; integer arrays of the mask enter as JAX arrays."""
    mask = Mask(
        **{n: jnp.asarray(x) if isinstance(x, (np.ndarray, np.integer)) else x for n, x in case.mask.items()}
    )
    return forgetting_attention(
        *arrays, mask=mask, return_lse=True, implementation=implementation, **case.options
    )


def value_and_gradients(case, implementation, arrays, cotangents):
    """o, lse and the gradient of sum(o do) + sum(lse dlse) over the rows that see a key, for every operand."""
    do, dlse = (jnp.asarray(x, arrays[0].dtype) for x in cotangents)
    named = {name: x for name, x in zip(NAMES, arrays, strict=True) if x is not None}

    def loss(named):
        o, lse = attend(case, implementation, [named.get(name) for name in NAMES])
        finite = jnp.where(lse > -jnp.inf, lse, 0)
        return (o * do).sum() + (finite * dlse).sum(), (o, lse)

    gradients, (o, lse) = jit(jax.grad(loss, has_aux=True))(named)
    return o, lse, gradients


def assert_near(actual, expected, bound, what):
    expected = np.asarray(expected, np.float64)
    actual = np.asarray(actual, np.float64)
    assert np.array_equal(np.isneginf(actual), np.isneginf(expected)), f"{what}: -inf in different places"
    finite = ~np.isneginf(expected)
    actual, expected = np.where(finite, actual, 0), np.where(finite, expected, 0)
    error = np.abs(actual - expected) / np.maximum(1, np.abs(expected))
    assert error.max() <= bound, f"{what}: largest error {error.max():.1e} > {bound:.0e} at {error.argmax()}"


class Contract(contract.OpContract):
    """The shared contract, and what gates add to it. Subclasses set `implementation`."""

    cases = CASES
    named = CASES  # for the tests below, which take theirs by name
    small = BlockSizes(8, 8)
    loose = {"global": 1e-4}  # one long sum loses digits
    bfloat16_tolerance = 2e-2

    def operands(self, case, rng):
        log_f = -np.log1p(np.exp(-rng.normal(1.0, 2.0, size=(case.B, case.S, case.H))))
        return super().operands(case, rng) | ({"log_f": log_f} if case.gated else {})

    def call(self, case, implementation, operands):
        log_f = operands.get("log_f")
        wide = jnp.promote_types(jnp.float32, operands["q"].dtype)
        o, lse = forgetting_attention(
            operands["q"], operands["k"], operands["v"], None if log_f is None else jnp.asarray(log_f, wide),
            mask=self.mask(case), return_lse=True, implementation=implementation, **case.options,
        )  # fmt: skip
        return {"o": o, "lse": lse}

    def test_vmap_over_a_traced_offset(self):
        case = self.named["traced_chunk"]
        arrays, _ = operands(case, np.float32)

        def at(offset):
            return forgetting_attention(
                *arrays, mask=Mask(q_offset=offset), implementation=self.implementation, **case.options
            )

        offsets, single = jnp.array([0, 29, 56]), jit(at)
        mapped = jit(jax.vmap(at))(offsets)
        for n, offset in enumerate(offsets):
            assert_near(mapped[n], single(offset), 1e-6, f"{offset=}")

    def test_causality_by_exact_zeros(self):
        """The gradient of row 20 is exactly zero for later keys and gates, and for nothing before them."""
        case = self.named["sixty_three"]
        self._only_reads(case, row=20, keys=slice(0, 21), gates=slice(1, 21))

    def test_packed_documents_are_isolated_by_exact_zeros(self):
        """Row 40 of batch row 0 lies in the document of keys 31..62; its first gate (31) is never read."""
        case = self.named["segments"]
        self._only_reads(case, row=40, keys=slice(31, 41), gates=slice(32, 41))

    def test_window_by_exact_zeros(self):
        """Row 8 stands at position 100 and sees keys 64..100 (gates before them get a sum of zeros up to rounding)."""
        case = self.named["window"]
        self._only_reads(case, row=8, keys=slice(64, 101), gates=slice(0, 101))

    def _only_reads(self, case, row, keys, gates):
        arrays, _ = operands(case, np.float32)
        gradients = jit(jax.grad(lambda a: attend(case, self.implementation, a)[0][0, row].sum()))(arrays)
        for name, gradient, read in zip(
            NAMES, gradients, (slice(row, row + 1), keys, keys, gates), strict=True
        ):
            moved = (np.asarray(gradient) != 0).any((2, 3) if gradient.ndim == 4 else 2)
            expected = np.zeros(moved.shape, bool)
            expected[0, read] = True
            sure = np.ones(moved.shape, bool)
            if case.mask.get("window") and name == "log_f":
                sure[:, : keys.start + 1] = False
            assert np.array_equal(moved[sure], expected[sure]), name

    @pytest.mark.smoke
    def test_unread_gates_change_nothing_and_get_zero_gradient(self):
        case = Case(23, 23, mask={"starts": np.array([0, 9], np.int32)}, options={"block_sizes": self.small})
        arrays, _ = operands(case, np.float32)
        changed = [*arrays[:3], arrays[3].copy()]
        changed[3][0, 0], changed[3][1, :10] = -3.0, -70.0

        def loss(a):
            o, _ = attend(case, self.implementation, a)
            return (o**2).sum(), o

        run = jit(jax.grad(loss, has_aux=True))
        gradient, o = run(arrays)
        np.testing.assert_array_equal(o, run(changed)[1])
        gradient = gradient[3]
        assert np.all(gradient[0, 0] == 0) and np.all(gradient[1, :10] == 0)
        assert np.all(gradient[0, 1:-1] != 0) and np.all(gradient[1, 10:] != 0)
