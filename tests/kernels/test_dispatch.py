"""Choosing an implementation, and running one on the shards of a mesh (on a toy operation)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.sequence import Exchange


def no_gpu(arguments):
    return "needs a GPU of the Hopper generation"


PLAIN = Implementation("plain", lambda x: x + 1)
FAST = Implementation("fast", lambda x: x + 2, no_gpu, platforms=("cuda",))
WIDE = Implementation(
    "wide", lambda x: x + 3, lambda x: None if x.ndim == 2 else f"wants a matrix, got {x.ndim=}"
)
TPU = Implementation("tpu", lambda x: x + 4, platforms=("tpu",))


@pytest.mark.smoke
def test_none_takes_the_first_usable_one_and_a_name_takes_that_one():
    vector, matrix = jnp.zeros(3), jnp.zeros((2, 2))
    assert dispatch.run([FAST, WIDE, PLAIN], None, vector)[0] == 1
    assert dispatch.run([FAST, WIDE, PLAIN], None, matrix)[0, 0] == 3
    assert dispatch.run([FAST, WIDE, PLAIN], "plain", matrix)[0, 0] == 1


def test_a_named_implementation_runs_or_says_why_not():
    with pytest.raises(
        ValueError, match="'fast' cannot run: needs a GPU of the Hopper .*available here: 'plain'"
    ):
        dispatch.run([FAST, WIDE, PLAIN], "fast", jnp.zeros(3))
    with pytest.raises(ValueError, match="implementation='quick' does not exist; available here: 'plain'"):
        dispatch.run([FAST, PLAIN], "quick", jnp.zeros(3))
    with pytest.raises(
        ValueError, match="no implementation can run .* fast: needs a GPU .* tpu: not for this platform"
    ):
        dispatch.run([FAST, TPU], None, jnp.zeros(3))


def test_several_candidates_are_chosen_by_the_platform_compiled_for(monkeypatch):
    monkeypatch.setattr(dispatch, "PREPARED", dispatch.ACCELERATORS)

    def traced(x):
        return dispatch.run([TPU, PLAIN], None, x)

    assert jax.jit(traced)(jnp.zeros(3))[0] == 1
    exported = {
        p: jax.export.export(jax.jit(traced), platforms=[p])(jnp.zeros(3)).mlir_module()
        for p in ("cpu", "tpu")
    }
    assert (
        "dense<4.0" in exported["tpu"]
        and "dense<4.0" not in exported["cpu"]
        and "dense<1.0" in exported["cpu"]
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Toy:
    """x [B, H], y [B, K], a factor that must stay a Python number."""

    x: jax.Array
    y: jax.Array
    factor: int


LAYOUT = Toy("bh", "bk", "")


def grouped(toy):
    assert isinstance(toy.factor, int)
    return toy.factor * toy.x * jnp.repeat(toy.y, toy.x.shape[1] // toy.y.shape[1], axis=1)


def on_mesh(shape, toy, record=None):
    def local(toy):
        if record is not None:
            record.append((toy.x.shape, toy.y.shape))
        return grouped(toy)

    mesh = Mesh(
        np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "fsdp", "sequence", "tensor")
    )
    with jax.set_mesh(mesh):
        return jax.jit(lambda x, y: dispatch.over_mesh(local, Toy(x, y, toy.factor), LAYOUT, "bh"))(
            toy.x, toy.y
        )


@pytest.mark.parametrize(
    ("mesh", "sizes", "local"),
    [
        ((2, 2, 1, 2), (8, 4, 2), ((2, 2), (2, 1))),
        ((2, 1, 2, 2), (8, 4, 1), ((4, 2), (4, 1))),  # one key/value head, copied to both
        ((1, 1, 1, 4), (8, 8, 2), ((8, 2), (8, 1))),  # two heads over four devices
        ((4, 1, 1, 2), (6, 4, 4), ((6, 2), (6, 2))),  # four does not divide the batch
        ((4, 2, 1, 1), (6, 4, 4), ((3, 4), (3, 4))),  # but two does
        ((1, 1, 1, 4), (8, 12, 6), ((8, 12), (8, 6))),  # heads fit neither way
        ((1, 1, 1, 1), (3, 4, 2), ((3, 4), (3, 2))),
    ],
)
def test_shards(mesh, sizes, local):
    B, H, K = sizes
    r = np.random.default_rng(0)
    toy, record = Toy(jnp.asarray(r.normal(size=(B, H))), jnp.asarray(r.normal(size=(B, K))), 3), []
    np.testing.assert_allclose(on_mesh(mesh, toy, record), grouped(toy), rtol=1e-6)
    assert record[-1] == local


def test_inside_another_shard_map_and_outside_a_mesh_nothing_is_split():
    toy, record = Toy(jnp.ones((4, 4)), jnp.ones((4, 2)), 2), []

    def local(toy):
        record.append(toy.x.shape)
        return grouped(toy)

    dispatch.over_mesh(local, toy, LAYOUT, "bh")
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1, 1, 1), ("data", "fsdp", "sequence", "tensor"))
    spec = jax.sharding.PartitionSpec("data")
    with jax.set_mesh(mesh):
        inner = jax.shard_map(lambda x, y: dispatch.over_mesh(local, Toy(x, y, 2), LAYOUT, "bh"),
                              in_specs=(spec, spec), out_specs=spec)  # fmt: skip
        np.testing.assert_array_equal(inner(toy.x, toy.y), grouped(toy))
    assert record == [(4, 4), (2, 4)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Timed:
    """x [B, T], y [B, S]."""

    x: jax.Array
    y: jax.Array


def scaled(timed):
    return timed.x * timed.y.sum(1, keepdims=True)


def summed(operation, timed, axis):
    return operation(Timed(timed.x, jax.lax.psum(timed.y, axis.name)))


def alone(operation, timed, axis):
    return operation(timed)


BOTH = Exchange(summed, lambda timed, size: timed.y.shape[1] > size)
ROWS = Exchange(alone, letters="t")


@pytest.mark.parametrize(
    ("T", "S", "exchanges", "local"),
    [
        (8, 12, (BOTH, ROWS), ((1, 2), (1, 3))),
        (8, 12, (), ((1, 8), (1, 12))),
        (8, 4, (BOTH, ROWS), ((1, 2), (1, 4))),  # the first one does not fit: one key a device
        (8, 5, (BOTH, ROWS), ((1, 2), (1, 5))),  # four does not divide the keys
        (7, 12, (BOTH, ROWS), ((1, 7), (1, 12))),  # nor the rows
    ],
)
def test_time_is_split_by_the_first_exchange_that_fits(T, S, exchanges, local):
    r, record = np.random.default_rng(0), []
    timed = Timed(jnp.asarray(r.normal(size=(2, T))), jnp.asarray(r.normal(size=(2, S))))

    def operation(timed):
        record.append((timed.x.shape, timed.y.shape))
        return scaled(timed)

    def loss(x, y):
        z = dispatch.over_mesh(operation, Timed(x, y), Timed("bt", "bs"), "bt", exchanges)
        return (z**2).sum(), z

    mesh = Mesh(np.array(jax.devices()).reshape(2, 1, 4, 1), ("data", "fsdp", "sequence", "tensor"))
    with jax.set_mesh(mesh):
        gradients, z = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(timed.x, timed.y)
    assert record[0] == local
    np.testing.assert_allclose(z, scaled(timed), rtol=1e-5)
    want = jax.grad(lambda x, y: (scaled(Timed(x, y)) ** 2).sum(), argnums=(0, 1))(timed.x, timed.y)
    for x, y in zip(gradients, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)
