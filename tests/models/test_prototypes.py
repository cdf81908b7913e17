"""The prototype network: its table of methods, its start, and prototypes added, overwritten and taken away by hand.

Letters: N batch, F inputs, P prototypes, C classes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.attention.inverse_distance import inverse_distance_attention
from attnlab.attention.prototypes import METHODS, idw_network
from attnlab.models.prototypes import PrototypeNetwork, Prototypes, augment, augment_all, remove, with_slots
from kernels.masks import Mask

N, F, P, C = 7, 3, 5, 4
STATIC = ("method", "eps", "power", "temperature", "implementation")
logits_of = functools.partial(jax.jit(idw_network, static_argnames=STATIC), implementation="reference")


def draw(seed=0, shape=(F,)):
    r = np.random.default_rng(seed)
    return (r.normal(size=size).astype(np.float32) for size in ((N, *shape), (P, *shape), (P, C)))


def trained(seed=0, shape=(F,)):
    """A network with sizeable logits, and inputs."""
    x, keys, values = draw(seed, shape)
    return Prototypes(jnp.asarray(keys), 3 * jnp.asarray(values)), jnp.asarray(x)


def answers(prototypes, x, **options):
    return logits_of(x, prototypes.keys, prototypes.values, active=prototypes.active, **options)


def by_table(x, keys, values, method, eps, power, temperature):
    """The table of the module, in NumPy, from differences."""
    r = np.sqrt(((x[:, None] - keys[None]) ** 2).sum(-1)) ** power
    dot = x @ keys.T
    if method == "fc-relu":
        return np.maximum(dot, 0) @ values
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(keys, axis=1)
    score = {
        "idw": -np.log(eps + r),
        "dot": dot / np.sqrt(len(keys)),
        "dot-sqrtd": dot / np.sqrt(x.shape[1]),
        "cosine": dot / lengths / temperature,
        "neg-dist": -r,
        "exp-neg-dist": np.exp(-r / 2),
        "inv-dist": 1 / (eps + r),
    }[method]
    weights = np.exp(score - score.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ values


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_their_table_and_ignore_inactive_slots(method):
    x, keys, values = draw()
    options = {"method": method, "eps": 0.2, "power": 3.0, "temperature": 0.4}
    want = by_table(x, keys, values, **options)
    np.testing.assert_allclose(logits_of(x, keys, values, **options), want, atol=2e-5)
    rows = np.array(
        [True, False, True, True, False, False, True, True]
    )  # room for 3 more, between the others
    roomy_keys, roomy_values = np.full((8, F), 0.1, np.float32), np.full((8, C), 50, np.float32)
    roomy_keys[rows], roomy_values[rows] = keys, values
    np.testing.assert_allclose(
        logits_of(x, roomy_keys, roomy_values, active=rows, **options), want, atol=2e-5
    )


def test_the_network_is_the_operator_with_one_head():
    x, keys, values = draw(shape=(2, 3))
    o = inverse_distance_attention(
        x.reshape(1, N, 1, 6),
        keys.reshape(1, P, 1, 6),
        values[None, :, None],
        power=3.0,
        mask=Mask(causal=False),
    )
    np.testing.assert_array_equal(idw_network(x, keys, values, power=3.0), o[0, :, 0])


def test_no_active_slot_gives_zeros_and_cosine_has_no_nan_at_zero():
    x, keys, values = draw()
    assert np.all(logits_of(x, keys, values, active=np.zeros(P, bool)) == 0)
    x[0] = keys[0] = 0
    gradients = jax.jit(
        jax.grad(lambda x, keys: jnp.sum(idw_network(x, keys, values, method="cosine") ** 2), (0, 1))
    )(x, keys)
    assert all(np.all(np.isfinite(g)) for g in gradients) and np.all(gradients[0][0] == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "manhattan"}, "method='manhattan' is unknown; choose one of 'idw', 'dot'"),
        ({"power": 0.0}, "power=0.0 must be positive"),
        ({"eps": -1.0}, "eps=-1.0 must be positive"),
        ({"keys": np.ones((P, F + 1), np.float32)}, r"keys is float32\[5, 4\], expected Float\[P \*shape\]"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    x, keys, values = draw()
    with pytest.raises(ValueError, match=message):
        idw_network(**({"x": x, "keys": keys, "values": values} | options))


def test_distance_networks_start_near_the_data_with_nothing_to_say():
    """Loss log C; keys N(mean, (0.1 std)^2) per input, unmoved by the first gradient, because the values are 0."""
    x = np.random.default_rng(0).normal([5.0, -2.0], [3.0, 0.1], size=(500, 2)).astype(np.float32)
    network = PrototypeNetwork(num_prototypes=1000, num_classes=C)
    params = jax.jit(network.init)(jax.random.key(0), x)
    keys = np.asarray(params["params"]["keys"])
    np.testing.assert_allclose(keys.mean(0), x.mean(0), atol=0.03)
    np.testing.assert_allclose(keys.std(0), 0.1 * x.std(0), rtol=0.1)

    def loss(params):
        labels = jnp.arange(500) % C
        return optax.losses.softmax_cross_entropy_with_integer_labels(network.apply(params, x), labels).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, np.log(C), rtol=1e-6)
    assert np.all(gradient["params"]["keys"] == 0) and np.any(gradient["params"]["values"] != 0)


def test_dot_product_networks_start_uniformly():
    params = PrototypeNetwork(400, C, method="dot").init(jax.random.key(0), jnp.ones((1, 2, 3)))["params"]
    for name, size in (("keys", 6), ("values", C)):
        bound = np.sqrt(6 / size)
        assert 0.97 * bound < np.abs(params[name]).max() <= bound
        np.testing.assert_allclose(params[name].std(), bound / np.sqrt(3), rtol=0.1)


@pytest.mark.parametrize(
    "changes",
    [{"method": "neg-dist"}, {"eps": 1.0}, {"power": 4.0}, {"method": "cosine"}, {"dtype": jnp.bfloat16}],
    ids=str,
)
def test_every_option_of_the_module_counts(changes):
    x, keys, values = draw()
    params = {"params": {"keys": keys, "values": values}}
    plain = PrototypeNetwork(P, C)
    got, want = (jax.jit(m.apply)(params, x) for m in (plain.clone(**changes), plain))
    assert got.dtype == changes.get("dtype", jnp.float32)
    assert np.abs(got - want).max() > 1e-4
    if changes == {"method": "cosine"}:
        assert np.abs(jax.jit(plain.clone(temperature=0.1, **changes).apply)(params, x) - got).max() > 1e-4


def test_a_module_of_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method='manhattan' is unknown"):
        PrototypeNetwork(P, C, method="manhattan").init(jax.random.key(0), jnp.ones((2, F)))


@pytest.mark.parametrize("shape", [(F,), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("margin", [None, 0.7])
def test_an_added_prototype_answers_as_told(shape, margin):
    """The margin is Delta / (1 + eps Z) as published, or exactly the one asked for; row and slot give the same."""
    prototypes, x = trained(shape=shape)
    eps, power = 1e-3, 4.0
    before = answers(prototypes, x[:1], eps=eps, power=power)[0]
    c = int(before.argmin())
    new, done = augment(prototypes, x[0], c, eps=eps, power=power, margin=margin)
    assert len(new.keys) == P + 1 and new.active is None and done.added and done.slot == P
    after = answers(new, x[:1], eps=eps, power=power)[0]
    Z = np.sum(1 / (eps + np.sum((x[0] - prototypes.keys) ** 2, axis=tuple(range(1, 1 + len(shape)))) ** 2))
    lead = after[c] - np.delete(after, c).max()
    np.testing.assert_allclose(lead, margin or (before.max() - before[c]) / (1 + eps * Z), rtol=2e-4)
    roomy, again = augment(with_slots(prototypes, P + 2), x[0], c, eps=eps, power=power, margin=margin)
    assert roomy.keys.shape == (P + 2, *shape) and again.slot == P and again.eta == done.eta
    np.testing.assert_allclose(
        answers(roomy, x, eps=eps, power=power), answers(new, x, eps=eps, power=power), atol=1e-5)  # fmt: skip


def test_elsewhere_logits_move_by_the_share_of_the_new_prototype():
    prototypes, x = trained()
    before = answers(prototypes, x)
    c = int(before[0].argmin())
    new, done = augment(prototypes, x[0], c)
    w = 1 / (1e-3 + np.sum((np.asarray(x)[1:, None] - np.asarray(new.keys)[None]) ** 2, -1))
    share = (w[:, -1] / w.sum(1))[:, None]
    value = done.eta * np.eye(C)[c]
    np.testing.assert_allclose(answers(new, x)[1:], before[1:] + share * (value - before[1:]), atol=1e-4)


def test_right_answers_change_nothing_unless_the_margin_is_too_small():
    prototypes, x = trained()
    before = answers(prototypes, x[:1])[0]
    c = int(before.argmax())
    lead = float(before[c] - np.delete(before, c).max())
    for network in (prototypes, with_slots(prototypes, P + 1)):
        for margin in (None, 0.9 * lead):
            same, done = augment(network, x[0], c, margin=margin)
            assert not done.added and done.eta == 0 and done.slot == -1
            for old, new in zip(jax.tree.leaves(network), jax.tree.leaves(same), strict=True):
                np.testing.assert_array_equal(old, new)
    more, done = augment(prototypes, x[0], c, margin=1.5 * lead)
    after = answers(more, x[:1])[0]
    assert done.added
    np.testing.assert_allclose(after[c] - np.delete(after, c).max(), 1.5 * lead, rtol=1e-3)


def test_overwriting_a_slot_keeps_the_margin():
    """Even if the slot is the nearest one, whose weight and value vanish with it."""
    prototypes, x = trained()
    slot = int(jnp.sum((x[0] - prototypes.keys) ** 2, axis=1).argmin())
    c = int(answers(prototypes, x[:1])[0].argmin())
    new, done = augment(prototypes, x[0], c, slot=slot, margin=0.5)
    after = answers(new, x[:1])[0]
    assert done.slot == slot and new.keys.shape == (P, F)
    np.testing.assert_array_equal(new.keys[slot], x[0])
    np.testing.assert_allclose(after[c] - np.delete(after, c).max(), 0.5, rtol=1e-4)


def test_many_in_turn_under_jit_and_without_are_the_same():
    prototypes, x = trained()
    cs = answers(prototypes, x).argmin(1)
    run = jax.jit(functools.partial(augment_all, margin=0.2))
    roomy, done = run(with_slots(prototypes, P + N), x, cs)
    grown, one_by_one = augment_all(prototypes, x, cs, margin=0.2)
    np.testing.assert_array_equal(done.added, one_by_one.added)
    np.testing.assert_allclose(done.eta, one_by_one.eta, rtol=1e-3)
    np.testing.assert_allclose(answers(roomy, x), answers(grown, x), atol=2e-3)
    assert int(roomy.active.sum()) == len(grown.keys) == P + int(done.added.sum())
    np.testing.assert_array_equal(answers(grown, x).argmax(1)[-1], cs[-1])


def test_no_room_is_not_silent():
    prototypes, x = trained()
    full = with_slots(prototypes, P)
    c = int(answers(prototypes, x[:1])[0].argmin())
    with pytest.raises(ValueError, match="none of the 5 slots is free"):
        augment(full, x[0], c)
    broken, _ = jax.jit(lambda network: augment(network, x[0], c))(full)
    assert np.all(np.isnan(answers(broken, x[:1])))
    with pytest.raises(ValueError, match="make room with with_slots"):
        jax.jit(lambda network: augment(network, x[0], c))(prototypes)


def test_removing_undoes_adding():
    prototypes, x = trained()
    c = int(answers(prototypes, x[:1])[0].argmin())
    for network in (prototypes, with_slots(prototypes, P + 1)):
        new, done = augment(network, x[0], c)
        assert np.abs(answers(new, x) - answers(network, x)).max() > 1e-2
        np.testing.assert_array_equal(answers(remove(new, int(done.slot)), x), answers(network, x))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.ones(F + 1, np.float32), 0), {}, r"x has shape \(4,\), expected that of one key, \(3,\)"),
        ((np.ones(F, np.float32), C), {}, "class c=4 does not exist; there are 4"),
        ((np.ones(F, np.float32), 0), {"slot": P}, "slot=5 does not exist; there are 5"),
        ((np.ones(F, np.float32), 0), {"margin": 0.0}, "margin=0.0 must be positive"),
    ],
)
def test_bad_edits_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        augment(trained()[0], *arguments, **options)


def test_bad_slots_are_refused():
    with pytest.raises(ValueError, match="slots=4 is below the 5 prototypes"):
        with_slots(trained()[0], 4)
    with pytest.raises(ValueError, match="slot=7 does not exist"):
        remove(trained()[0], 7)
