"""The public operation, whatever computes it: states, padding, heads, devices, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from kernels.linear import Mask, State, linear_attention
from tests.kernels.contract import relative_error

compiled = jax.jit(linear_attention, static_argnames=("implementation", "angle"))
IMPLEMENTATIONS = ("reference", "blockwise")


def operands(T=12, B=2, H=4, K=2, D=5, Dv=3, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, D), (B, T, K, D), (B, T, K, Dv))
    return [jnp.asarray(np.maximum(rng.normal(size=s), 0) if n < 2 else rng.normal(size=s), jnp.float32)
            for n, s in enumerate(shapes)]  # fmt: skip


def near(got, want, bound=2e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < bound


@pytest.mark.parametrize(
    ("implementation", "angle"),
    [("reference", 0.1), ("blockwise", 0.1), ("blockwise", np.array([0.0, 0.1, 0.5, 1.0, 2.0], np.float32))],
)
def test_pieces_with_the_state_between_equal_the_whole(implementation, angle):
    arrays = operands()
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 3 + [2] * 6 + [0] * 3])

    def run(q, k, v, segments, state=None):
        mask = Mask(q_segments=segments, kv_segments=segments)
        return linear_attention(q, k, v, mask=mask, angle=angle, initial_state=state, return_state=True,
                                chunk_size=2, implementation=implementation)  # fmt: skip

    def in_pieces(*whole):
        state, pieces = None, []
        for piece in (slice(0, 4), slice(4, 5), slice(5, 12)):
            *n, state = run(*(x[:, piece] for x in whole), state)
            pieces.append(n)
        return [*(jnp.concatenate(x, axis=1) for x in zip(*pieces, strict=True)), state]

    near(jax.jit(in_pieces)(*arrays, segments), jax.jit(run)(*arrays, segments))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pieces_with_decays_equal_the_whole(implementation):
    q, k, v = operands()
    g, h = -jnp.square(k), -jnp.square(v)

    def run(q, k, v, g, h, state=None):
        num, _, state = linear_attention(
            q, k, v, log_key_decay=g, log_value_decay=h, angle=0.1, initial_state=state, return_state=True,
            denominator=False, chunk_size=2, implementation=implementation,
        )  # fmt: skip
        return num, state

    def in_pieces(*whole):
        state, pieces = None, []
        for piece in (slice(0, 4), slice(4, 5), slice(5, 12)):
            num, state = run(*(x[:, piece] for x in whole), state)
            pieces.append(num)
        return jnp.concatenate(pieces, axis=1), state

    near(jax.jit(in_pieces)(q, k, v, g, h), jax.jit(run)(q, k, v, g, h))


def test_gradients_flow_through_the_state():
    q, k, v = operands()

    def loss(k, pieces, implementation):
        state, total = None, 0.0
        for first, last in pieces:
            num, den, state = linear_attention(
                q[:, first:last], k[:, first:last], v[:, first:last], angle=0.1, initial_state=state,
                return_state=True, implementation=implementation,
            )  # fmt: skip
            total += jnp.sum(jnp.sin(num)) + jnp.sum(jnp.cos(den))
        return total + jnp.sum(jnp.sin(state.real)) + jnp.sum(jnp.sin(state.imag))

    gradient = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    got = gradient(k, ((0, 5), (5, 6), (6, 12)), "blockwise")
    assert relative_error(got, gradient(k, ((0, 12),), "reference")) < 2e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_see_nothing_are_zero(implementation):
    q, k, v = operands()
    segments = jnp.array([[0] * 3 + [1] * 9, [1] * 6 + [0] * 6])
    for fields, empty in (
        ({"starts": jnp.array([0, 4])}, {1: slice(0, 4)}),
        ({"q_segments": segments, "kv_segments": segments}, {0: slice(0, 3), 1: slice(6, 12)}),
        ({"causal": False, "lengths": jnp.array([0, 5])}, {0: slice(0, 12)}),
    ):
        num, den = compiled(q + 1, k + 1, v, mask=Mask(**fields), angle=0.1, implementation=implementation)
        for row, rows in empty.items():
            assert np.all(np.asarray(num)[row, rows] == 0) and np.all(np.asarray(den)[row, rows] == 0)
            rest = np.delete(np.asarray(den)[row], np.arange(12)[rows], axis=0)
            assert np.all(rest != 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hidden_keys_may_hold_anything(implementation):
    q, k, v = operands()
    bad = jnp.full_like(v[:, :4], jnp.nan)
    mask = Mask(starts=jnp.array([4, 4]))
    clean = compiled(q, k, v, mask=mask, angle=0.1, implementation=implementation)
    dirty = compiled(q, k, v.at[:, :4].set(bad), mask=mask, angle=0.1, implementation=implementation)
    for x, y in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(x, y)


def test_queries_may_stand_before_and_after_all_keys():
    q, k, v = operands()
    mask = Mask(q_offset=-3)
    q, k, v = q + 1, k[:, :5] + 1, v[:, :5]
    got = compiled(q, k, v, mask=mask, angle=0.1)
    near(got, compiled(q, k, v, mask=mask, angle=0.1, implementation="reference"))
    assert np.all(np.asarray(got[1])[:, :3] == 0) and np.all(np.asarray(got[1])[:, 8:] > 0)


def test_grouped_heads_equal_repeated_ones():
    q, k, v = operands()
    got = compiled(q, k, v, angle=0.1)
    near(got, compiled(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2), angle=0.1))


def test_segments_that_are_equal_but_not_one_array_give_the_same():
    q, k, v = operands()
    segments = np.array([[1] * 5 + [2] * 7] * 2)
    one = jnp.asarray(segments)
    same = compiled(q, k, v, mask=Mask(q_segments=one, kv_segments=one), angle=0.1)
    two = Mask(q_segments=segments, kv_segments=segments.copy())
    near(compiled(q, k, v, mask=two, angle=0.1), same)


@pytest.mark.parametrize(
    ("shape", "K", "kind"),
    [
        ((4, 1, 1, 2), 2, AxisType.Auto),
        ((1, 2, 1, 4), 1, AxisType.Auto),
        ((2, 2, 1, 2), 2, AxisType.Explicit),
    ],
)
def test_equals_one_device(shape, K, kind):
    q, k, v = operands(B=4, K=K)
    segments = jnp.array([[1] * 5 + [2] * 7] * 4)
    angle = jnp.array([[0.1], [0.2], [0.05], [0.3]])

    def run(q, k, v):
        mask = Mask(q_segments=segments, kv_segments=segments)
        num, den, state = linear_attention(q, k, v, mask=mask, angle=angle, return_state=True)
        loss = jnp.sin(num).sum() + jnp.sin(den).sum() + jnp.sin(state.real).sum() + jnp.sin(state.imag).sum()
        return loss, (num, den, state)

    both = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))
    want = both(q, k, v)
    mesh = Mesh(
        np.array(jax.devices()).reshape(shape), ("data", "fsdp", "sequence", "tensor"), axis_types=(kind,) * 4
    )
    with jax.set_mesh(mesh):
        got = both(q, k, v)
    assert got[1][2].real.shape == (4, K, 5, 4)
    near(jax.tree.map(np.asarray, got), want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": Mask(window=3)}, "mask.window=3: a sum over all keys cannot forget"),
        ({"chunk_size": 0}, "chunk_size=0 must be a positive integer"),
        ({"angle": np.zeros(4, np.float32)}, r"angle has shape \(4,\), expected a number, \[D\]"),
        ({"angle": np.zeros(5, np.int32)}, "angle has dtype int32, expected a float dtype"),
        ({"initial_state": State(jnp.zeros((2, 2, 5, 3)))}, r"initial_state.real has shape \(2, 2, 5, 3\)"),
        ({"initial_state": State(jnp.zeros((2, 2, 5, 4)), jnp.zeros((2, 2, 5, 4)))}, "give the angle"),
        ({"initial_state": State(jnp.zeros((2, 2, 5, 4)), None, jnp.zeros(2, int))}, "the mask has none"),
        (
            {"log_value_decay": np.zeros((2, 12, 2, 3), np.float32)},
            "no one denominator adds up; give denominator=False",
        ),
        (
            {"log_key_decay": np.zeros((2, 12, 2), np.float32), "mask": Mask(causal=False)},
            "mask.causal=False with a decay",
        ),
        (
            {"log_key_decay": np.zeros((2, 12, 4), np.float32)},
            r"log_key_decay is float32\[2, 12, 4\], expected Float\[B S K\] or Float\[B S K D\]",
        ),
        (
            {"log_key_decay": np.zeros((2, 12, 2, 5), jnp.bfloat16)},
            "log_key_decay has dtype bfloat16, expected float32",
        ),
        (
            {"denominator": False, "initial_state": State(jnp.zeros((2, 2, 5, 4)))},
            r"shape \(2, 2, 5, 4\), expected .*denominator=False, = \(2, 2, 5, 3\)",
        ),
        ({"implementation": "blockwise", "allowed": np.ones((2, 12, 12), bool)}, "no dense `allowed` matrix"),
        ({"q": np.zeros((2, 12, 3, 5), np.float32)}, "H=3 query heads must be a multiple of the K=2"),
        ({"k": np.zeros((2, 11, 2, 5), np.float32)}, "v is .*expected"),
        (
            {"v": np.zeros((2, 12, 2, 3), jnp.bfloat16)},
            "must share one float dtype; got float32, float32, bfloat16",
        ),
        ({"v": np.zeros((2, 12, 2, 0), np.float32)}, "every dimension must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = dict(zip("qkv", operands(), strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments)


def test_a_dense_mask_goes_to_the_reference_unless_refused():
    q, k, v = operands()
    num, den = linear_attention(q, k, v, allowed=np.zeros((2, 12, 12), bool))
    assert np.all(np.asarray(num) == 0) and np.all(np.asarray(den) == 0)
