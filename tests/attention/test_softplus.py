"""Softplus attention: the mixer contract, that every option counts, and the properties the paper's equations imply."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.attention_metrics import attention_metrics, row_metrics
from attnlab.attention.normalised_family import FORMS, Form, family_attention, unit_vectors
from attnlab.attention.rotary import rotate
from attnlab.attention.softmax import softmax_attention
from attnlab.attention.softplus import SoftplusConfig, lssa, lssar, softplus_attention
from kernels import masks
from kernels.masks import Mask
from tests.attention.contract import C, MixerContract, apply, build, decode, inputs, variants


@variants(
    grouped={"num_heads": 6, "num_kv_heads": 2},
    learned={
        "variant": "ssmax",
        "power": 4.0,
        "power_learned": True,
        "degenerate": "lssa",
        "num_heads": 3,
        "window": 5,
    },
)
class TestSoftplusMixer(MixerContract):
    name = "softplus"
    bfloat16_tolerance = 3e-2
    tolerance = 1e-4  # p = 15 multiplies rounding by 15
    flops_excess = 1.15  # the dense form's powers and logarithms are elementwise

    def test_bfloat16_stays_close(self, options):
        """In the root mean square: the power p multiplies the rounding of single scores by 15."""
        wide, params = build(self.name, **options)
        narrow, _ = build(self.name, dtype=jnp.bfloat16, **options)
        x = inputs().astype(jnp.bfloat16)
        got, want = apply(narrow, params, x), apply(wide, params, x.astype(jnp.float32))
        assert got.dtype == jnp.bfloat16
        error = np.asarray(got, np.float32) - want
        assert np.sqrt(np.mean(error**2) / np.mean(want**2)) < self.bfloat16_tolerance


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"variant": "lssa"}, {}),
        ({"phi": "sigmoid"}, {}),
        ({"phi_power": 2.0}, {"phi": "relu"}),
        ({"scale": "rsqrtd"}, {}),
        ({"bias": "minus_logn"}, {}),
        ({"bias": "alibi"}, {}),
        ({"normalise": "none"}, {}),
        ({"qk_norm": "off"}, {}),
        ({"qk_norm": "on"}, {"variant": "softmax"}),
        ({"power": 3.0}, {}),
        ({"reweight": False}, {}),
        ({"offset": 0.5}, {}),
        ({"warm_rows": 9}, {}),
        ({"logit_gain": 1.0}, {}),
        ({"fixed_count": 40}, {"variant": "sigmoid"}),
        ({"rope": False}, {}),
        ({"rope_theta": 100.0}, {}),
        ({"window": 4}, {}),
    ],
)
def test_every_option_changes_the_output(changes, base):
    assert np.abs(short_output(**base) - short_output(**(base | changes))).max() > 1e-4


@functools.cache
def short_output(**options):
    """Of one set of parameters, which serves every variant."""
    module, params = build("softplus", variant="ssmax", implementation="reference")
    config = SoftplusConfig(num_heads=2, head_dim=10, implementation="reference", **options)
    return apply(module.clone(config=config.resolve(2, 0, 10, C)), params, inputs(length=11, batch=1))


def test_degenerate_rows_are_empty_or_keep_stage_one():
    """Without positions, a sequence of equal tokens has equal keys; its rows beyond the third have no mean excess."""
    x = jnp.broadcast_to(inputs(length=1, batch=1), (1, 7, C))
    options = {"rope": False, "implementation": "reference"}
    zero, params = build("softplus", **options)
    kept, _ = build("softplus", degenerate="lssa", **options)
    plain, _ = build("softplus", reweight=False, **options)
    y = apply(zero, params, x)
    assert np.all(y[:, 3:] == 0) and np.all(np.abs(y[:, :3]).max(-1) > 0)
    np.testing.assert_allclose(apply(kept, params, x), apply(plain, params, x), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: apply(zero, params, x)[:, 3:].sum()))(x)
    assert np.all(gradient == 0)


def test_learned_power_starts_at_the_variants_and_may_be_switched_off():
    options = {"num_heads": 3, "implementation": "reference"}
    fixed, params = build("softplus", **options)
    learned, more = build("softplus", power_learned=True, **options)
    more = {"params": params["params"] | {"power_bias": more["params"]["power_bias"]}}
    np.testing.assert_allclose(jax.nn.softplus(more["params"]["power_bias"]), 15.0, rtol=1e-6)
    np.testing.assert_allclose(apply(learned, more, inputs()), apply(fixed, params, inputs()), atol=1e-4)
    without = learned.clone(config=dataclasses.replace(learned.config, reweight=False))
    assert np.abs(apply(without, more, inputs()) - apply(learned, more, inputs())).max() > 1e-3


def test_scalable_softmax_starts_from_its_length():
    for length in (64, 1024):
        _, params = build("softplus", variant="ssmax", implementation="reference", ssmax_length=length)
        np.testing.assert_allclose(params["params"]["ssmax_scale"], 1 / np.log(length), rtol=1e-6)


def test_the_cache_holds_rotated_unit_keys():
    module, params = build("softplus", num_heads=6, num_kv_heads=2)
    _, cache = decode(module, params, inputs(), (9, 1, 1, 12))
    np.testing.assert_allclose(jnp.linalg.norm(cache.key, axis=-1), 1.0, atol=1e-6)


def test_metrics_are_stored_when_asked_for():
    module, params = build("softplus", implementation="reference")
    x, positions = inputs(length=11), jnp.arange(11)[None]
    call = jax.jit(lambda params, x: module.apply(params, x, positions=positions, mutable=["intermediates"]))
    y, stored = call(params, x)
    metrics = stored["intermediates"]["attention_metrics"][0]
    np.testing.assert_allclose(y, apply(module, params, x), atol=1e-6)
    assert {name: m.shape for name, m in metrics.items()} == dict.fromkeys(metrics, (2,)) and len(
        metrics
    ) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "sofmax"}, "form 'sofmax' is unknown; known: lssa, lssar"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"phi": "tanh"}, "phi='tanh' is unknown"),
        ({"scale": "big"}, "scale='big' is unknown"),
        ({"qk_norm": "yes"}, "qk_norm='yes' is unknown"),
        ({"degenerate": "mean"}, "degenerate='mean' is unknown"),
        ({"window": -1}, "window=-1 is negative"),
        ({"phi_power": 2.0}, "needs phi='relu', got form.phi='softplus'"),
        ({"variant": "lssa", "warm_rows": 4}, "warm_rows=4 belongs to re-weighting"),
        ({"variant": "lssa", "power_learned": True}, "power_learned=True belongs to re-weighting"),
        ({"variant": "softmax", "reweight": False}, "reweight=False changes nothing in variant='softmax'"),
        ({"variant": "softmax", "logit_gain": 2.0}, "replaces log D, which form.scale='rsqrtd'"),
        ({"variant": "softmax", "fixed_count": 9}, "fixed_count=9 changes nothing"),
        ({"ssmax_length": 64}, "belongs to variant='ssmax'"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        SoftplusConfig(**({"num_heads": 2, "head_dim": 10} | options)).resolve(2, 0, 10, 22)


# Properties of the equations. The operator runs in its default, linear-memory form unless said otherwise.


def draw(T=13, S=13, H=2, K=2, D=6, Dv=5, seed=0):
    r = np.random.default_rng(seed)
    return [r.normal(size=(1, *shape)) for shape in ((T, H, D), (S, K, D), (S, K, Dv))]


run = jax.jit(softplus_attention, static_argnums=3, static_argnames=("offset", "warm_rows"))


@pytest.fixture(autouse=True)
def wide(request):
    """The properties are exact: they are looked at in float64."""
    if request.node.name.startswith("test_property"):
        with jax.enable_x64(True):
            yield
    else:
        yield


@pytest.mark.parametrize("power", [None, 15.0])
def test_property_invariance_to_lengths_and_orthogonal_gradients(power):
    q, k, v = draw()
    alpha, beta = np.full((1, 13, 1, 1), 7.0), 0.1 + np.random.default_rng(1).random((1, 13, 2, 1))
    np.testing.assert_allclose(run(alpha * q, beta * k, v, power), run(q, k, v, power), atol=1e-12)
    dq, dk = jax.jit(jax.grad(lambda q, k: jnp.sum(jnp.sin(run(q, k, v, power))), argnums=(0, 1)))(q, k)
    for x, dx in ((q, dq), (k, dk)):
        assert np.abs(np.sum(x * dx, -1)).max() < 1e-12 * np.abs(dx).max() and np.abs(dx).max() > 1e-3


def test_property_rotation_and_unit_length_commute():
    q, positions = draw()[0], jnp.arange(13)[None]
    a, b = unit_vectors(rotate(jnp.asarray(q), positions, 1e4)), rotate(unit_vectors(q), positions, 1e4)
    np.testing.assert_allclose(a, b, atol=1e-15)


def test_property_first_row_is_its_value_and_power_one_without_offset_is_lssa():
    q, k, v = draw()
    for power in (None, 15.0):
        np.testing.assert_allclose(run(q, k, v, power)[:, 0], v[:, 0], atol=1e-15)
    np.testing.assert_allclose(run(q, k, v, 1.0, offset=0.0), run(q, k, v, None), atol=1e-14)
    np.testing.assert_allclose(lssa(q, k, v, implementation="reference"), run(q, k, v, None), atol=1e-14)


def test_property_exp_with_power_is_softmax_of_scaled_logits():
    q, k, v = draw()
    sharp = Form(phi="exp", scale="rsqrtd", qk_norm=False, power=3.0)
    want = softmax_attention(q, k, v, scale=3 / 6**0.5)
    np.testing.assert_allclose(family_attention(q, k, v, sharp, offset=0.0), want, atol=1e-14)


def test_property_large_powers_approach_the_largest_score():
    q, k, _ = draw(T=1, S=13)
    mask, one_hot = Mask(causal=False), np.eye(13)[None, :, None] * np.ones((1, 1, 2, 1))
    powers = (2.0, 15.0, 200.0, 4000.0)
    top = jax.jit(lambda q, k: [lssar(q, k, one_hot, p, mask=mask).max(-1).min() for p in powers])(q, k)
    assert np.all(np.diff(top) > 0) and top[-1] > 1 - 1e-9


@pytest.mark.parametrize("power", [None, 15.0])
def test_property_keys_may_be_permuted_and_values_enter_linearly(power):
    q, k, v = draw(T=5, S=13)
    mask, order = Mask(causal=False), np.random.default_rng(2).permutation(13)
    want = run(q, k, v, power, mask=mask)
    np.testing.assert_allclose(run(q, k[:, order], v[:, order], power, mask=mask), want, atol=1e-13)
    u = v**2
    both = run(q, k, 2 * v - 3 * u, power, mask=mask)
    np.testing.assert_allclose(both, 2 * want - 3 * run(q, k, u, power, mask=mask), atol=1e-12)


@pytest.mark.parametrize("power", [None, 15.0])
def test_property_counts_are_per_row_and_not_the_length(power):
    """The first rows of a longer run are the shorter run: it fails if N is taken for the sequence length."""
    q, k, v = draw(T=26, S=26)
    np.testing.assert_allclose(
        run(q, k, v, power)[:, :13], run(*(x[:, :13] for x in (q, k, v)), power), atol=1e-13
    )


def test_property_keys_below_the_threshold_move_it():
    """Their weight is exactly 0 and so is dv, but through the mean they have a gradient: checked by differences."""
    q, k, v = draw(T=1)
    mask, step = Mask(causal=False), 1e-6

    def loss(k, v):
        return jnp.sum(jnp.sin(run(q, k, v, 3.0, mask=mask)))

    dk, dv = jax.jit(jax.grad(loss, argnums=(0, 1)))(k, v)
    below = np.flatnonzero(np.abs(np.asarray(dv)).max((0, 2, 3)) == 0)
    assert len(below) > 2
    for j in below[:2]:
        direction = np.zeros_like(k)
        direction[0, j] = np.random.default_rng(j).normal(size=k.shape[2:])
        difference = (loss(k + step * direction, v) - loss(k - step * direction, v)) / (2 * step)
        np.testing.assert_allclose(np.sum(dk * direction), difference, rtol=1e-5)
        assert abs(difference) > 1e-6


@pytest.mark.parametrize("power", [None, 15.0])
def test_property_what_is_masked_may_hold_anything(power):
    q, k, v = draw()
    mask = Mask(causal=False, lengths=9)
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[:, 9:], bad_v[:, 9:] = 1e4, -1e4
    np.testing.assert_array_equal(run(q, bad_k, bad_v, power, mask=mask), run(q, k, v, power, mask=mask))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stress_is_finite(dtype):
    """Row 0 of the heads aims at one key (n P up to n), row 1 sees scores within a part in a thousand."""
    q, k, v = (jnp.asarray(x, dtype) for x in draw(T=257, S=257, D=8))
    q = q.at[:, :, 0].set(k[:, :1, 0]) * 30
    k = k.at[:, :, 1].set(k[:, :1, 1] + 1e-3 * k[:, :, 1])
    o, gradients = jax.jit(jax.value_and_grad(lambda x: lssar(*x).astype(jnp.float32).sum()))((q, k, v))
    assert np.isfinite(o) and all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize(
    "name", ["softmax_alibi", "relu2_l1", "softplus_none", "softplus_over_n", "softplus_l1_legacy_reweight"]
)
def test_forms_are_their_definition(name):
    """NumPy, row by row, from the form's fields; the golden files hold the other forms."""
    form = FORMS[name]
    q, k, v = draw(D=6)
    unit = (lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)) if form.qk_norm else (lambda x: x)
    phi = {"softplus": lambda s: np.log1p(np.exp(s)), "exp": np.exp, "sigmoid": lambda s: 1 / (1 + np.exp(-s)),
           "relu": lambda s: np.maximum(s, 0) ** form.phi_power}[form.phi]  # fmt: skip
    want = np.zeros((13, 2, 5))
    for i, h in np.ndindex(13, 2):
        n = i + 1
        c = {
            "rsqrtd": 6**-0.5,
            "logd_logn": np.log(6) * np.log(n),
            "logd_logn_rsqrtd": np.log(6) * np.log(n) * 6**-0.5,
        }
        s = c[form.scale] * (unit(k)[0, :n, h] @ unit(q)[0, i, h])
        s = s - (np.log(n) if form.bias == "minus_logn" else 0)
        s = s - (2.0 ** (-4 * (h + 1)) * (i - np.arange(n)) if form.bias == "alibi" else 0)
        P = phi(s) / {"l1": max(phi(s).sum(), 1e-300), "none": 1, "1/n": n}[form.normalise]
        if form.power is not None:
            P = np.maximum(n * P - (n > 3), 0) ** form.power
            P = P / max(P.sum(), 1e-300)
        want[i, h] = P @ v[0, :n, h]
    with jax.enable_x64(True):
        got = jax.jit(lambda *x: family_attention(*x, form))(q, k, v)[0]
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_forms_refuse_what_they_cannot_use():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in draw())
    calls = {
        "form 'sotfplus' is unknown": {"form": "sotfplus"},
        "learned_scale missing": {"form": "ssmax"},
        "learned_scale given": {"form": "lssa", "learned_scale": jnp.ones(2)},
        "form without power": {"form": "lssa", "learned_power": jnp.ones(2)},
        "replaces log D": {"form": "softmax", "logit_gain": 2.0},
        "power=0.0 must be positive": {"form": Form(power=0.0)},
    }
    for message, options in calls.items():
        with pytest.raises(ValueError, match=message):
            family_attention(q, k, v, **options)


def test_metrics_of_known_rows():
    weights = np.zeros((1, 1, 3, 4), np.float32)
    weights[0, 0, 0, 1] = 1.0  # sees keys 1 and 2: one of two carries all
    weights[0, 0, 1, 1:3] = 0.5
    visible = np.zeros((1, 3, 4), bool)
    visible[0, :2, 1:3] = True
    metrics = {name: np.asarray(x)[0, 0].tolist() for name, x in row_metrics(weights, visible).items()}
    assert metrics["effective_keys"] == [1.0, 2.0, 0.0]
    np.testing.assert_allclose(metrics["entropy"], [0, np.log(2), 0], atol=1e-6)
    assert metrics["first_key_weight"] == [1.0, 0.5, 0.0] and metrics["above_threshold"] == [0.5, 1.0, 0.0]


SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 2])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"q_segments": SEGMENTS, "kv_segments": np.pad(SEGMENTS, ((0, 0), (0, 6))), "lengths": np.array([8])},
    ],
)
def test_metrics_in_blocks_are_the_means_over_rows_that_see_a_key(fields):
    q, k, _ = (jnp.asarray(x, jnp.float32) for x in draw(T=11, S=17))
    k = k.at[:, :, 0].set(k[:, :1, 0])  # head 0 has equal keys: its rows are degenerate
    mask = Mask(q_offset=2, **fields)
    metrics = [
        jax.jit(lambda q, k, block=block: attention_metrics(q, k, mask=mask, block=block))(q, k)
        for block in (11, 4)
    ]
    for name, x in metrics[0].items():
        np.testing.assert_allclose(metrics[1][name], x, rtol=1e-5, err_msg=name)
    n = np.asarray(masks.dense(mask, 11, 17)[0].sum(-1))
    np.testing.assert_allclose(metrics[0]["degenerate_rows"], [(n > 3).sum() / (n > 0).sum(), 0], rtol=1e-6)
