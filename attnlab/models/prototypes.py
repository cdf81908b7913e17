"""A classifier made of prototypes (arXiv 2310.18805), and the editing of its prototypes by hand.

Letters: N batch, P prototypes, C classes, F inputs; r_j distance of x to key j, p `power`, w weight, Z their sum,
l logits, c the wanted class, m margin, e_c the unit vector of c.

A new prototype with key x and value eta e_c makes the network answer c at x, and little else different:

    w_j = 1 / (eps + r_j^p),  Z = sum_j w_j,  l = logits(x),  Delta = max_k l_k - l_c over k other than c
    eta = (1 + eps Z) Delta               as published: c then leads by Delta / (1 + eps Z)
    eta = eps Z Delta + m (1 + eps Z)     c then leads by exactly m
    l'(y) = l(y) + w_new / (Z(y) + w_new) (eta e_c - l(y))     at any y, with w_new the new prototype's weight there
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from attnlab.attention.inverse_distance import raise_distance
from attnlab.attention.prototypes import METHODS, idw_network
from kernels.signatures import Array, Float, Int, checked

FROM_DATA = ("idw", "neg-dist", "exp-neg-dist", "inv-dist")


class PrototypeNetwork(nn.Module):
    """`idw_network` with parameters `keys` [P, *shape] and `values` [P, C].

    Methods with a distance start with every key near the mean of the data and all values 0, so initialise the module
    with the training set or a good sample of it: `network.init(key, train_x)`. The other methods start uniformly.
    """

    num_prototypes: int
    num_classes: int
    method: str = "idw"
    eps: float = 1e-3
    power: float = 2.0
    temperature: float = 1.0  # of "cosine"
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, active: Array | None = None) -> Array:
        """x [N, *shape] -> logits [N, C]; active [P] bool leaves prototypes out."""
        if self.method not in METHODS:
            raise ValueError(
                f"method={self.method!r} is unknown; choose one of {', '.join(map(repr, METHODS))}"
            )
        from_data = self.method in FROM_DATA
        keys_init = _near_the_data if from_data else _uniform
        values_init = nn.initializers.zeros if from_data else _uniform
        wide = jnp.promote_types(self.param_dtype, x.dtype)
        keys = self.param("keys", lambda key: keys_init(key, (self.num_prototypes, *x.shape[1:]), wide, x)
                          .astype(self.param_dtype))  # fmt: skip
        values = self.param("values", values_init, (self.num_prototypes, self.num_classes), self.param_dtype)
        x, keys, values = (each.astype(self.dtype) for each in (x, keys, values))
        return idw_network(
            x, keys, values, method=self.method, eps=self.eps, power=self.power, temperature=self.temperature,
            active=active, implementation=self.implementation,
        )  # fmt: skip


def _near_the_data(key, shape, dtype, x):
    """N(mean, (0.1 std)^2) of every input over the data."""
    return jnp.mean(x, 0) + 0.1 * jnp.std(x, 0) * jax.random.normal(key, shape, dtype)


def _uniform(key, shape, dtype, x=None):
    """U(-b, b) with b = sqrt(6 / size of a row)."""
    bound = math.sqrt(6 / math.prod(shape[1:]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


@struct.dataclass
class Prototypes:
    """keys [P, *shape], values [P, C]; active [P] bool marks the slots in use, None: all.

    `Prototypes(**variables["params"])` are those of a `PrototypeNetwork`.
    """

    keys: Array
    values: Array
    active: Array | None = None


@struct.dataclass
class Augmentation:
    """What `augment` did: whether it changed anything, the value eta it wrote (else 0), the slot (else -1)."""

    added: Array
    eta: Array
    slot: Array


def with_slots(prototypes: Prototypes, slots: int) -> Prototypes:
    """The same network in arrays of `slots` >= P rows, the new ones free, so that additions keep shapes."""
    P = len(prototypes.keys)
    if slots < P:
        raise ValueError(f"slots={slots} is below the {P} prototypes there are; give at least as many")

    def grow(x):
        return jnp.pad(x, [(0, slots - P)] + [(0, 0)] * (x.ndim - 1))

    active = jnp.ones(P, bool) if prototypes.active is None else prototypes.active
    return Prototypes(grow(prototypes.keys), grow(prototypes.values), grow(active))


def remove(prototypes: Prototypes, slot: int) -> Prototypes:
    """The network without one prototype: its slot becomes free, or without `active` its row goes."""
    P = len(prototypes.keys)
    if not 0 <= slot < P:
        raise ValueError(f"slot={slot} does not exist; there are {P}")
    if prototypes.active is not None:
        return prototypes.replace(active=prototypes.active.at[slot].set(False))
    rows = np.arange(P) != slot
    return Prototypes(prototypes.keys[rows], prototypes.values[rows])


@checked
def augment(
    prototypes: Prototypes,
    x: Float[Array, "*shape"],
    c: int | Int[Array, ""],
    *,
    eps: float = 1e-3,
    power: float = 2.0,
    margin: float | None = None,
    slot: int | None = None,
) -> tuple[Prototypes, Augmentation]:
    """Make the idw network answer class c at x, by a prototype there; the equations stand above.

    Nothing changes if the answer is c already (with `margin`: if c leads by that much). The prototype goes

    - to `slot`, if given, over what was there (which does not count in Z and l if `margin` is given);
    - else to the first slot that is not active; if none is free, an error, or under jit a network of NaN;
    - else, without `active`, to a new row; shapes change, so not under jit.

    Args:
        prototypes: of an idw network.
        x: one input, shaped like one key.
        c: the wanted class.
        eps, power: those of the network.
        margin: m > 0, by how much c shall lead at x; None: the published choice.
        slot: row to overwrite.

    Returns: the new prototypes, and what was done.

    Raises: ValueError for an input, class or slot that does not fit, a margin that is not positive, no free slot.
    """
    P, C = prototypes.values.shape
    if x.shape != prototypes.keys.shape[1:]:
        raise ValueError(f"x has shape {x.shape}, expected that of one key, {prototypes.keys.shape[1:]}")
    if isinstance(c, (int, np.integer)) and not 0 <= c < C:
        raise ValueError(f"class c={c} does not exist; there are {C}")
    if slot is not None and not 0 <= slot < P:
        raise ValueError(f"slot={slot} does not exist; there are {P}")
    if margin is not None and not margin > 0:
        raise ValueError(f"margin={margin} must be positive")
    eta = _value_for(prototypes, x, c, eps, power, margin, slot)
    value = eta * jax.nn.one_hot(c, C, dtype=eta.dtype)
    if slot is None and prototypes.active is None:
        new, slot = _append(prototypes, eta > 0, x, value), P
    else:
        if slot is None:
            slot, value = _free_slot(prototypes.active, eta > 0, value)
        new = _write(prototypes, eta > 0, slot, x, value)
    return new, Augmentation(eta > 0, jnp.where(eta > 0, eta, 0), jnp.where(eta > 0, slot, -1))


def augment_all(prototypes: Prototypes, xs: Array, cs: Array, **options) -> tuple[Prototypes, Augmentation]:
    """`augment` for every xs [M, *shape] and cs [M] in turn, each on the network the ones before have left.

    options: eps, power, margin. Returns the last network and the M augmentations stacked. With `active` this is one
    compiled scan, in which a network that runs out of free slots turns into NaN.
    """
    xs, cs = jnp.asarray(xs), jnp.asarray(cs)
    if prototypes.active is not None:
        return jax.lax.scan(lambda p, each: augment(p, *each, **options), prototypes, (xs, cs))
    done = []
    for x, c in zip(xs, cs, strict=True):
        prototypes, one = augment(prototypes, x, c, **options)
        done.append(one)
    return prototypes, jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)


def _value_for(prototypes, x, c, eps, power, margin, slot):
    """eta for class c at x; <= 0 where nothing needs doing."""
    keys, values, P = prototypes.keys, prototypes.values, len(prototypes.keys)
    counted = jnp.ones(P, bool) if prototypes.active is None else prototypes.active
    if slot is not None and margin is not None:
        counted = counted & (jnp.arange(P) != slot)
    r2 = jnp.sum(jnp.square(x - keys).reshape(P, -1), axis=1)
    w = jnp.where(counted, 1 / (eps + raise_distance(r2, jnp.zeros_like(r2), power)), 0)
    Z = w.sum()
    l = w @ values / jnp.where(Z > 0, Z, 1)
    delta = jnp.max(jnp.where(jnp.arange(len(l)) == c, -jnp.inf, l)) - l[c]
    if margin is None:
        return (1 + eps * Z) * delta
    return jnp.where(delta + margin > 0, eps * Z * delta + margin * (1 + eps * Z), 0)


def _append(prototypes, added, x, value):
    if isinstance(added, jax.core.Tracer):
        raise ValueError(
            "a new row changes shapes, which jit forbids; make room with with_slots(prototypes, slots)"
        )
    if not added:
        return prototypes
    keys, values = prototypes.keys, prototypes.values
    keys = jnp.concatenate([keys, x[None].astype(keys.dtype)])
    return Prototypes(keys, jnp.concatenate([values, value[None].astype(values.dtype)]))


def _free_slot(active, added, value):
    """The first free slot, and the value to write there: NaN if there is none, which only jit lets through."""
    full = jnp.all(active)
    if not isinstance(full & added, jax.core.Tracer) and full and added:
        raise ValueError(f"none of the {len(active)} slots is free; make more with with_slots, or give slot=")
    return jnp.argmin(active), jnp.where(full, jnp.nan, value)


def _write(prototypes, added, slot, x, value):
    def put(array, new):
        return array if array is None else jnp.where(added, array.at[slot].set(new), array)

    x, value = x.astype(prototypes.keys.dtype), value.astype(prototypes.values.dtype)
    return Prototypes(put(prototypes.keys, x), put(prototypes.values, value), put(prototypes.active, True))
