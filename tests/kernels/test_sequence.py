"""The exchanges along the mesh axis "sequence", on toys whose result is known without them."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import pallas, rings, sequence
from kernels.forgetting import Mask, forgetting_attention
from kernels.sequence import Axis
from kernels.streaming.arguments import Arguments, Values
from tests.kernels.meshes import AXES, collectives, largest_exchanges, mesh_of

AXIS = Axis("sequence", 4)
TIME = PartitionSpec(None, "sequence")


def on_shards(function, *operands, out=TIME):
    """function(*shards [1, T / 4, ..]) on four devices."""
    with jax.set_mesh(mesh_of((1, 1, 4, 1))):
        mapped = jax.shard_map(function, in_specs=TIME, out_specs=out, check_vma=False)
        return np.asarray(jax.jit(mapped)(*operands))


@pytest.mark.smoke
def test_shifts_and_halos():
    x = jnp.arange(8.0)[None]
    np.testing.assert_array_equal(
        on_shards(lambda x: sequence.shift(x, AXIS), x)[0], [6, 7, 0, 1, 2, 3, 4, 5]
    )
    np.testing.assert_array_equal(
        on_shards(lambda x: sequence.shift(x, AXIS, -3), x)[0], [6, 7, 0, 1, 2, 3, 4, 5]
    )
    for count, first in ((1, [0]), (2, [0, 0]), (5, [0, 0, 0, 0, 0])):
        halo = on_shards(lambda x, n=count: sequence.from_left(x, AXIS, n), x)[0].reshape(4, count)
        want = np.pad(np.arange(8.0), (count, 0))
        np.testing.assert_array_equal(halo, [want[2 * r : 2 * r + count] for r in range(4)])
        np.testing.assert_array_equal(halo[0], first)


def test_what_the_last_device_holds_reaches_all_infinities_too():
    x = jnp.array([[1.0, 2, 3, -np.inf]])
    np.testing.assert_array_equal(on_shards(lambda x: sequence.last(x, AXIS), x), np.full((1, 4), -np.inf))
    assert on_shards(lambda x: sequence.last(x > 0, AXIS), -x).tolist() == [[True] * 4]


def test_a_state_is_carried_in_order_and_its_gradient_goes_back():
    """h <- a h + b, which does not commute."""
    a, b = jnp.array([[2.0, 3, 5, 7]]), jnp.array([[1.0, 10, 100, 1000]])

    def carry(a, b):
        return sequence.exclusive((a, b), jnp.full_like(a, 4.0), lambda h, own: own[0] * h + own[1], AXIS)

    np.testing.assert_array_equal(on_shards(carry, a, b)[0], [4, 9, 37, 285])

    def loss(a, b, run):
        return (run(a, b) * jnp.array([1.0, 2, 3, 4])).sum()

    def plain(a, b):
        h = [jnp.float32(4)]
        for n in range(3):
            h.append(a[0, n] * h[-1] + b[0, n])
        return jnp.stack(h)[None]

    with jax.set_mesh(mesh_of((1, 1, 4, 1))):
        run = jax.shard_map(carry, in_specs=TIME, out_specs=TIME, check_vma=False)
        got = jax.jit(jax.grad(partial(loss, run=run), argnums=(0, 1)))(a, b)
    for x, y in zip(got, jax.grad(partial(loss, run=plain), argnums=(0, 1))(a, b), strict=True):
        np.testing.assert_allclose(x, y)


@pytest.mark.parametrize(("mask", "visits"), [
    (Mask(), [1, 2, 3, 4]),
    (Mask(window=1), [1, 1, 1, 1]),
    (Mask(window=4), [1, 2, 2, 2]),  # shards of three: a row sees at most three keys back
    (Mask(window=5), [1, 2, 3, 3]),
    (Mask(causal=False), [4, 4, 4, 4]),
])  # fmt: skip
def test_only_shards_that_may_hold_a_visible_key_are_visited(mask, visits):

    def count(x):
        arguments = Arguments(x, x, x, Values(), mask, score=None, block_sizes=None)
        local = lambda *_: jnp.ones((1, 1))  # noqa: E731
        return rings.ring_of_keys(local, rings.Sum(), arguments, ("k", "v"), AXIS)

    assert on_shards(count, jnp.zeros((1, 12, 1, 1)))[0].tolist() == visits


def attention(q, k, v, log_f, mask=Mask()):  # noqa: B008 (frozen)
    return forgetting_attention(q, k, v, log_f, mask=mask)


def test_between_the_passes_a_ring_keeps_no_more_than_one_device_would():
    q = jnp.ones((1, 64, 2, 8))
    operands = (q, q, q, -jnp.ones((1, 64, 2)))
    kept = {}
    for devices in (1, 8):
        with jax.set_mesh(mesh_of((1, 1, devices, 1))):
            pull = jax.eval_shape(lambda *x: jax.vjp(attention, *x)[1], *operands)
        kept[devices] = sum(x.size for x in jax.tree.leaves(pull))
    assert kept[8] <= 1.3 * kept[1], "what all devices keep together"


def test_keys_are_never_gathered_and_whole_sequences_not_exchanged():
    q = jnp.ones((1, 64, 2, 8))
    ring = partial(collectives, shape=(1, 1, 4, 1))
    assert ring(attention, q, q, q, None) == {"collective_permute"}
    assert ring(attention, q, q, q, -jnp.ones((1, 64, 2))) == {
        "collective_permute",
        "all_gather",
    }  # of sums of gates
    assert ring(attention, q[:, :7], q[:, :7], q[:, :7], None) == set()  # four does not divide seven


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")
def test_compiled_for_tpus_keys_go_round_and_nothing_of_their_size_is_gathered():
    """Forward and backward, by the kernels that are the default there."""
    from kernels.report.targets import devices

    mesh = Mesh(np.array(devices("v5e")).reshape(1, 1, 4, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    placed = NamedSharding(mesh, TIME)

    def shape(heads, *rest, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, 4096, heads, *rest), dtype, sharding=placed)

    def loss(*operands):
        return jnp.square(attention(*operands).astype(jnp.float32)).sum()

    operands = shape(8, 128), shape(4, 128), shape(4, 128), shape(8, dtype=jnp.float32)
    with jax.set_mesh(mesh), pallas.compiling_for("tpu"):
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), out_shardings=placed)
        found = largest_exchanges(gradients.lower(*operands).compile())
    shard = 4096 * 4 * 128 // 4
    assert found.pop("collective-permute") == shard
    assert max(found.values(), default=0) <= 4 * 8, found  # sums of gates, of every shard
