"""Inverse distance weighting attention: the operator's identities, its numerics, and the mixer.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.inverse_distance import (
    InverseDistanceAttention,
    InverseDistanceConfig,
    centers,
    inverse_distance_attention,
    raise_distance,
    squared_distances,
    squared_norms,
)
from attnlab.attention.rotary import rotate
from kernels import masks
from kernels.masks import Mask
from kernels.streaming import merge, product
from tests.attention.contract import MixerContract, apply, build, decode, inputs, variants

IMPLEMENTATIONS = ("reference", "blockwise")
# Identities hold for every implementation alike (tests/kernels/streaming); the dense one compiles fastest.
STATIC = ("power", "form", "center", "exclude_self", "return_log_z", "implementation")
compiled = jax.jit(inverse_distance_attention, static_argnames=STATIC)
attend = functools.partial(compiled, implementation="reference")


@variants(
    learned_grouped={"num_heads": 6, "num_kv_heads": 2, "learn_eps": True, "eps": 0.1, "qk_norm": True},
    window_tied_center_alibi={
        "num_heads": 3, "window": 5, "center": True, "alibi": True, "rope": False, "shared_qk": True,
        "power": 3.0, "learn_power": False, "eps": 0.5, "form": "official",
    },
)  # fmt: skip
class TestInverseDistanceMixer(MixerContract):
    name = "inverse_distance"
    tolerance = 5e-5  # scores multiply the rounding of a distance by p / (eps + r^2)


def draw(*shapes, seed=0, dtype=np.float32):
    r = np.random.default_rng(seed)
    return [r.normal(size=shape).astype(dtype) for shape in shapes]


def by_equations(q, k, v, seen, power, eps, form="official", slopes=None):
    """o and log Z pair by pair in NumPy, from differences; q [B, T, H, D], k, v [B, S, H, .], seen [B, T, S]."""
    o, log_z = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
    for b, t, h in np.ndindex(*q.shape[:3]):
        js = np.flatnonzero(seen[b, t])
        if not js.size:
            continue
        r = np.sqrt(((q[b, t, h] - k[b, js, h]) ** 2).sum(-1))
        w = 1 / (eps[h] + r ** power[h]) if form == "official" else (eps[h] + r**2) ** (-power[h] / 2)
        w = w if slopes is None else w * np.exp(-slopes[h] * (t - js))
        o[b, t, h], log_z[b, t, h] = w @ v[b, js, h] / w.sum(), np.log(w.sum())
    return o, log_z


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("form", "power", "options"),
    [
        ("official", 2.0, {}),
        ("official", [1.0, 3.0, 6.0], {"slopes": np.array([0.1, 0.3, 0.0])}),
        ("rq", [2.0, 4.5, 0.7], {}),
    ],
    ids=["p2", "official_heads_alibi", "rq_heads"],
)  # fmt: skip
def test_operator_is_its_equations(form, power, options, implementation):
    q, k, v = draw((2, 13, 3, 5), (2, 13, 3, 5), (2, 13, 3, 7), dtype=np.float64)
    mask = Mask(starts=jnp.array([0, 4]))
    seen = np.broadcast_to(masks.dense(mask, 13, 13), (2, 13, 13))
    eps, power = np.array([1e-3, 0.1, 1.0]), power if isinstance(power, float) else np.array(power)
    want = by_equations(q, k, v, seen, np.broadcast_to(power, 3), eps, form, **options)
    with jax.enable_x64(True):
        static = {"form": form, "mask": mask, "return_log_z": True, "implementation": implementation}
        call = functools.partial(inverse_distance_attention, power=power, eps=eps, **static, **options)
        got = jax.jit(call)(q, k, v)
    np.testing.assert_allclose(got[0], want[0], atol=1e-12)
    np.testing.assert_allclose(got[1], want[1], atol=1e-11)


@pytest.mark.parametrize("form", ["official", "rq"])
def test_gradients_equal_finite_differences(form):
    """Away from hits, for q, k, v, per-head powers (below 2 too) and eps."""
    q, k, v, weight = draw((1, 5, 2, 3), (1, 7, 2, 3), (1, 7, 2, 3), (1, 5, 2, 3), dtype=np.float64)
    given = {"q": q, "k": k, "v": v, "power": np.array([1.0, 4.5]), "eps": np.array([0.3, 0.1])}

    def loss(given):
        o = inverse_distance_attention(**given, form=form, mask=Mask(q_offset=2), implementation="reference")
        return jnp.sum(o * weight)

    with jax.enable_x64(True):
        value, gradients = jax.jit(loss), jax.jit(jax.grad(loss))(given)
        for name, x in given.items():
            direction = np.random.default_rng(1).normal(size=x.shape)
            up, down = (value(given | {name: x + step * direction}) for step in (1e-6, -1e-6))
            np.testing.assert_allclose(
                np.sum(gradients[name] * direction), (up - down) / 2e-6, rtol=1e-6, err_msg=name
            )


def test_constant_values_come_back_and_outputs_stay_in_the_hull():
    q, k, v = draw((2, 11, 2, 5), (2, 11, 2, 5), (2, 11, 2, 3))
    o = attend(q, k, np.ones_like(v))
    np.testing.assert_allclose(o, 1, atol=1e-6)
    o = attend(q, k, v, power=8.0, mask=Mask(causal=False))
    assert np.all(o <= v.max(1, keepdims=True) + 1e-5) and np.all(o >= v.min(1, keepdims=True) - 1e-5)


def test_invariances():
    """Translation; scale with eps c^p; keys in any order; a key written twice counts twice."""
    q, k, v = draw((1, 7, 2, 5), (1, 11, 2, 5), (1, 11, 2, 3), dtype=np.float64)
    options = {"mask": Mask(causal=False), "power": 3.0, "return_log_z": True}
    call = functools.partial(attend, **options)
    with jax.enable_x64(True):
        o, log_z = call(q, k, v)
        np.testing.assert_allclose(call(q + 2.5, k + 2.5, v)[0], o, atol=1e-12)
        np.testing.assert_allclose(call(4 * q, 4 * k, v, eps=1e-3 * 4.0**3)[0], o, atol=1e-12)
        order = np.random.default_rng(2).permutation(11)
        np.testing.assert_allclose(call(q, k[:, order], v[:, order])[0], o, atol=1e-13)
        twice = [np.concatenate([x, x], axis=1) for x in (k, v)]
        again, more = call(q, *twice)
        np.testing.assert_allclose(again, o, atol=1e-13)
        np.testing.assert_allclose(more, log_z + np.log(2), atol=1e-13)


def test_limits():
    """A hit with small eps gives its value; far queries and large eps the mean; large powers the nearest key's."""
    k, v = draw((1, 11, 1, 5), (1, 11, 1, 3))
    everything = Mask(causal=False)
    hits = attend(k, k, v, mask=everything, eps=1e-6)
    np.testing.assert_allclose(hits, v, atol=2e-5)
    eps, others = 0.1, ((k[0, 3, 0] - np.delete(k[0, :, 0], 3, 0)) ** 2).sum(-1)
    share = (1 / eps) / (1 / eps + np.sum(1 / (eps + others)))
    picked = attend(
        k[:, 3:4], k, (np.arange(11) == 3).astype(np.float32).reshape(1, 11, 1, 1), mask=everything, eps=eps
    )
    np.testing.assert_allclose(picked[0, 0, 0, 0], share, rtol=1e-5)
    mean = np.broadcast_to(v.mean(1, keepdims=True), v.shape)
    np.testing.assert_allclose(attend(k + 1e6, k, v, mask=everything), mean, atol=1e-4)
    np.testing.assert_allclose(attend(k, k, v, mask=everything, eps=1e8), mean, atol=1e-5)
    q = draw((1, 4, 1, 5), seed=3)[0]
    nearest = ((q[0, :, None, 0] - k[0, None, :, 0]) ** 2).sum(-1).argmin(1)
    np.testing.assert_allclose(
        attend(q, k, v, mask=everything, power=600.0, form="rq")[0, :, 0], v[0, nearest, 0], atol=1e-4)  # fmt: skip


def test_halves_of_the_keys_add_up():
    """Numerators and Z of two key halves are summed: partial results merge exactly."""
    q, k, v = draw((2, 7, 2, 5), (2, 12, 2, 5), (2, 12, 2, 3))
    options = {"mask": Mask(causal=False), "return_log_z": True}
    o, log_z = attend(q, k, v, **options)
    halves = [attend(q, k[:, part], v[:, part], **options) for part in (slice(0, 5), slice(5, 12))]
    merged, total = merge(*halves[0], *halves[1])
    np.testing.assert_allclose(merged, o, atol=1e-6)
    np.testing.assert_allclose(total, log_z, atol=1e-6)
    np.testing.assert_allclose(np.exp(log_z), sum(np.exp(z) for _, z in halves), rtol=1e-5)


@pytest.mark.parametrize(("form", "implementation"), [("official", "blockwise"), ("rq", "reference")])
def test_gradients_at_exact_hits_duplicates_and_empty_rows(form, implementation):
    """Powers 1 and 3; q_t = k_t in head 0, keys 3 and 4 equal, row 0 sees nothing.

    Against distances from differences, where a hit is exactly 0 and its gradient is cut: rounding of the expanded form
    must not let the root's slope at 1e-16 in.
    """
    q, k, v = draw((1, 9, 2, 5), (1, 9, 2, 5), (1, 9, 2, 3), dtype=np.float64)
    k[:, 4], q[:, :, 0] = k[:, 3], k[:, :, 0]
    given, mask = {"q": q, "k": k, "v": v, "power": np.array([1.0, 3.0])}, Mask(starts=jnp.array([1]))

    def ours(q, k, v, power):
        options = {"form": form, "mask": mask, "implementation": implementation}
        return inverse_distance_attention(q, k, v, power=power, **options)

    def by_differences(q, k, v, power):
        r2 = jnp.sum((q[:, :, None] - k[:, None]) ** 2, -1)
        root = jnp.where(r2 > 0, jnp.where(r2 > 0, r2, 1) ** (power / 2), 0)
        w = 1 / (1e-3 + root) if form == "official" else (1e-3 + r2) ** (-power / 2)
        w = jnp.where(masks.dense(mask, 9, 9)[..., None], w, 0)
        Z = w.sum(2, keepdims=True)
        return jnp.einsum("btsh,bshd->bthd", w / jnp.where(Z > 0, Z, 1), v)

    def evaluate(call):
        def loss(given):
            o = call(**given)
            return jnp.sum(jnp.sin(3 * o)), o

        return jax.jit(jax.grad(loss, has_aux=True))(given)

    with jax.enable_x64(True):
        (got, o), (want, _) = jax.tree.map(np.asarray, (evaluate(ours), evaluate(by_differences)))
    for name, x in got.items():
        np.testing.assert_allclose(x, want[name], atol=1e-10, err_msg=name)
    assert np.all(o[0, 0] == 0) and np.all(got["q"][0, 0] == 0)


def test_the_root_of_a_distance_has_gradient_zero_at_zero():
    r2 = jnp.array([0.0, 1e-9, 4.0])
    for power, at_four in ((1.0, 0.25), (1.9, 0.95 * 4**-0.05), (2.0, 1.0), (6.0, 48.0)):
        slope = jax.grad(lambda r2, p=power: jnp.sum(raise_distance(r2, jnp.full(3, 1e-8), p)))(r2)
        exact = power % 2 == 0  # no root, so nothing to cut
        np.testing.assert_allclose(slope[0], 1.0 if power == 2 else 0.0, atol=1e-30)
        assert exact or slope[1] == 0
        np.testing.assert_allclose(slope[2], at_four, rtol=1e-6)


def test_distances_of_rounded_vectors():
    """Norms come from the operands as rounded: near hits keep their distance and r^2 does not fall below zero."""
    q = draw((128, 64))[0] + 1.0
    k = q + 0.01 * draw((128, 64), seed=1)[0]
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k)]
    exact = ((np.float64(low[0])[:, None] - np.float64(low[1])[None]) ** 2).sum(-1)

    def distances(q, k):
        return squared_distances(
            product(q, k), squared_norms(q)[:, None], squared_norms(k)[None], q.shape[-1]
        )

    r2, error = distances(*low)
    assert r2.dtype == jnp.float32 and np.abs(r2 - exact).max() < 1e-4
    assert np.all(np.abs(r2 - exact) <= error)
    assert np.all(distances(q, q)[0] >= 0)


def test_grouped_heads_are_repeated_heads():
    q, k, v = draw((2, 9, 6, 5), (2, 9, 3, 5), (2, 9, 3, 4))
    repeated = [np.repeat(x, 2, axis=2) for x in (k, v)]
    np.testing.assert_allclose(attend(q, k, v, power=3.0), attend(q, *repeated, power=3.0), atol=1e-6)


def test_rotated_distances_depend_on_relative_positions():
    q, k, v = draw((1, 9, 2, 6), (1, 9, 2, 6), (1, 9, 2, 3))
    turned = [[rotate(x, jnp.arange(9)[None] + shift, 100.0) for x in (q, k)] for shift in (0, 31)]
    np.testing.assert_allclose(attend(*turned[0], v), attend(*turned[1], v), atol=2e-4)
    assert np.abs(attend(*turned[0], v) - attend(q, k, v)).max() > 1e-2


def test_exclude_self_hides_one_key_a_row():
    q, k, v = draw((1, 7, 2, 5), (1, 7, 2, 5), (1, 7, 2, 3))
    o = attend(q, k, v, exclude_self=True)
    assert np.all(o[:, 0] == 0)
    seen = np.tril(np.ones((1, 7, 7), bool), -1)
    want, _ = by_equations(q, k, v, seen, [2.0, 2.0], [1e-3, 1e-3])
    np.testing.assert_allclose(o, want, atol=2e-5)


@pytest.mark.parametrize("window", [0, 4])
def test_exclude_self_in_single_steps(window):
    """The first token gets 0, and the cache, rolling or not, gives what the parallel form gives."""
    options = {"window": window, "exclude_self": True, "shared_qk": True, "eps": 0.5}
    module, params = build("inverse_distance", **options)
    want = apply(module, params, inputs())
    got, _ = decode(module, params, inputs(), (9, 1, 1, 12))
    assert np.all(want[:, 0] == 0)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("fields", [
    {"causal": False, "lengths": np.array([9, 4])}, {"starts": np.array([0, 3])},
    {"q_segments": np.array([[2, 2, 2, 7, 7, 1, 1, 1, 1], [0, 5, 5, 5, 5, 5, 5, 0, 0]])},
    {"causal": False, "q_segments": np.array([[2, 7, 2, 7, 7, 1, 2, 1, 1], [0, 5, 5, 5, 5, 5, 5, 0, 0]])},
], ids=["lengths", "starts", "packed", "scattered"])  # fmt: skip
def test_centering_changes_rounding_only(fields):
    """Results are the same; with a common offset of 100 the error falls."""
    fields = fields | ({"kv_segments": fields["q_segments"]} if "q_segments" in fields else {})
    mask = Mask(**{n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in fields.items()})
    q, k, v = draw((2, 9, 4, 5), (2, 9, 2, 5), (2, 9, 2, 3))
    plain = attend(q, k, v, mask=mask)
    np.testing.assert_allclose(attend(q, k, v, mask=mask, center=True), plain, atol=1e-5)
    far = [np.float32(x + np.float32(100)) for x in (q, k)]
    near = [x - np.float32(100) for x in far]
    want = attend(*near, v, mask=mask)
    kept, lost = (np.abs(attend(*far, v, mask=mask, center=c) - want).max() for c in (True, False))
    assert kept < 2e-5 < lost


def test_the_center_passes_no_gradient():
    """Row 8 with a window of 3 does not see key 0, which centers it."""
    q, k, v = draw((1, 9, 2, 5), (1, 9, 2, 5), (1, 9, 2, 3))

    def loss(k):
        return jnp.sum(attend(q, k, v, mask=Mask(window=3), center=True)[:, 8] ** 2)

    reach = np.abs(jax.grad(loss)(k)).max((0, 2, 3))
    assert np.all(reach[:6] == 0) and np.all(reach[6:] > 0)


def test_centers_are_the_first_visible_keys_of_documents():
    k = jnp.arange(7.0).reshape(1, 7, 1, 1)
    segments = jnp.array([[3, 3, 3, 8, 8, 0, 0]])
    mask = Mask(q_segments=segments, kv_segments=segments, starts=jnp.array([1]))
    of_queries, of_keys = centers(k, mask, 7)
    np.testing.assert_array_equal(of_keys[0, 1:5, 0, 0], [1, 1, 3, 3])
    np.testing.assert_array_equal(of_queries[0, 1:5, 0, 0], [1, 1, 3, 3])
    assert centers(k, Mask(causal=False, lengths=jnp.array([4])), 7)[0].item() == 1.5
    assert centers(k, Mask(starts=jnp.array([2])), 7)[1].item() == 2


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"form": "official"}, {"eps": 0.5}),
        ({"power": 2.0}, {}),
        ({"eps": 0.5}, {}),
        ({"qk_norm": True}, {}),
        ({"qk_norm_eps": 1.0}, {"qk_norm": True}),
        ({"shared_qk": True}, {}),
        ({"exclude_self": True}, {}),
        ({"rope": False}, {}),
        ({"rope_theta": 100.0}, {}),
        ({"alibi": True}, {}),
        ({"window": 4}, {}),
    ],
    ids=lambda options: "_".join(options) or "plain",
)
def test_every_option_changes_the_output(changes, base):
    """Equal parameters have equal values, because Flax draws each from its name."""
    base = {"num_heads": 2, "head_dim": 10, "learn_power": False, "implementation": "reference"} | base

    def output(options):
        config = InverseDistanceConfig(**options).resolve(2, 0, 10, 22)
        module = InverseDistanceAttention(config, 22, init_std=0.3)
        return module.init_with_output(jax.random.key(0), inputs(length=7), positions=jnp.arange(7)[None])[0]

    assert np.abs(output(base | changes) - output(base)).max() > 1e-4


def test_center_changes_the_rounding_of_far_tokens():
    x = inputs() + 30.0
    module, params = build("inverse_distance", rope=False)
    centered, _ = build("inverse_distance", rope=False, center=True)
    difference = np.abs(apply(centered, params, x) - apply(module, params, x)).max()
    assert 0 < difference < 0.2


def test_learned_numbers_start_where_they_are_said_to():
    module, params = build("inverse_distance", learn_eps=True, eps=0.25)
    power, eps = (jax.nn.softplus(params["params"][name]) for name in ("power_bias", "eps_bias"))
    np.testing.assert_allclose(power, np.sqrt(20.0), rtol=1e-6)
    np.testing.assert_allclose(eps, 0.25, rtol=1e-6)
    fixed, fixed_params = build("inverse_distance", learn_power=False, eps=0.25)
    assert "power_bias" not in fixed_params["params"]
    np.testing.assert_allclose(apply(module, params, inputs()), apply(fixed, params, inputs()), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "cubic"}, "form='cubic' is unknown; choose one of 'official', 'rq'"),
        ({"power": -1.0}, "power=-1.0 must be positive, or 0 for"),
        ({"eps": 1e-9}, "eps=1e-09 must be at least 1e-6"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"window": -1}, "window=-1 is negative"),
        ({"num_heads": 4, "num_kv_heads": 2, "shared_qk": True}, "num_heads=4 and num_kv_heads=2"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        InverseDistanceConfig(**({"num_heads": 2, "head_dim": 10} | options)).resolve(2, 0, 10, 22)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "cubic"}, "form='cubic' is unknown"),
        ({"power": 0.0}, "power=0.0 must be positive"),
        ({"eps": -1.0}, "eps=-1.0 must be positive"),
        ({"power": np.ones(3)}, r"power is float32\[3\], expected Float\[H\] or Float\[\] with H=2"),
        ({"slopes": np.ones((2, 2))}, r"slopes is float32\[2, 2\]"),
        ({"implementation": "abacus"}, "implementation='abacus' does not exist"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    q = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ValueError, match=message):
        inverse_distance_attention(q, q, q, **options)
