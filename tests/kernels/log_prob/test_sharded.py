"""On eight devices token_log_probs equals one device, outputs and every gradient, and no logits travel or are whole."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import pallas
from kernels.log_prob import BlockSizes, token_log_probs
from tests.kernels.contract import relative_error
from tests.kernels.log_prob.contract import LogProbContract, head

AXES = ("data", "fsdp", "sequence", "tensor")


def mesh_of(shape, kind=AxisType.Auto) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(shape), AXES, axis_types=(kind,) * 4)


def assert_equal_to_one_device(shape, case, implementation="blockwise", kind=AxisType.Auto):
    contract = LogProbContract()
    operands = contract.draw(case, np.float32)
    want, want_gradients = contract.evaluate(case, "reference", operands)
    with jax.set_mesh(mesh_of(shape, kind)):
        got, gradients = contract.evaluate(
            case, implementation, {n: jnp.asarray(x) for n, x in operands.items()}
        )
    np.testing.assert_array_equal(got["argmax"], want["argmax"])
    for name in ("logp", "lse", "entropy"):
        assert relative_error(got[name], want[name]) < 1e-5, name
    assert set(gradients) == {"hidden", "weight"}
    for name, x in gradients.items():
        assert relative_error(x, want_gradients[name]) < 1e-5, name


@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((2, 2, 1, 2), head(6, 22, (8, 4), B=8, D=8, absent=True, soft_cap=3.0)),
        (
            (1, 2, 2, 2),
            head(6, 22, (8, 4), B=4, D=7, vocab_axis=0),
        ),  # 2 does not divide D: dw is whole everywhere
        ((2, 1, 2, 2), head(5, 21, B=6)),  # nor T and V
        ((1, 4, 1, 2), head(4, 24, B=2, D=4, vocab_axis=0)),  # 4 does not divide B
    ],
)
def test_equals_one_device(shape, case):
    assert_equal_to_one_device(shape, case)


def test_on_a_mesh_of_explicit_axes():
    assert_equal_to_one_device((2, 2, 1, 2), head(6, 22, (8, 4), B=8, D=8), kind=AxisType.Explicit)


@pytest.mark.thorough
@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_kernels_on_a_mesh(implementation):
    with pallas.interpreted():
        assert_equal_to_one_device((1, 2, 2, 2), head(4, 300, B=2, D=8, vocab_axis=0), implementation)


def test_inside_another_shard_map_nothing_is_split_again():
    h, w = np.random.default_rng(0).normal(size=(8, 3, 4)), np.random.default_rng(1).normal(size=(4, 10))
    labels = np.arange(24).reshape(8, 3) % 10
    with jax.set_mesh(mesh_of((8, 1, 1, 1))):
        mapped = jax.shard_map(
            lambda h, labels: token_log_probs(h, w, labels).logp,
            in_specs=P("data"),
            out_specs=P("data"),
            check_vma=False,
        )
        got = jax.jit(mapped)(h, labels)
    np.testing.assert_allclose(got, token_log_probs(h, w, labels).logp, atol=1e-5)


def test_no_logits_travel_and_the_weights_gradient_is_scattered():
    """Compiled for eight devices: collectives carry rows, hidden states and weights, dw arrives cut up along D."""
    B, T, D, V = 8, 32, 16, 512
    mesh = mesh_of((1, 4, 1, 2))
    rows, head_spec = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P("fsdp", "tensor"))

    def loss(h, w, labels):
        out = token_log_probs(h, w, labels, block_sizes=BlockSizes(16, 64))
        return out.logp.sum() + out.entropy.sum()

    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.grad(loss, argnums=(0, 1)),
            in_shardings=(rows, head_spec, rows),
            out_shardings=(rows, head_spec),
        )
        shapes = [
            jax.ShapeDtypeStruct(s, t)
            for s, t in (((B, T, D), jnp.float32), ((D, V), jnp.float32), ((B, T), jnp.int32))
        ]
        text = step.lower(*shapes).compile().as_text()
    moved = re.findall(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    )
    assert {"all-gather", "all-reduce", "reduce-scatter"} <= {kind for _, kind in moved}
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for types, _ in moved
        for dims in re.findall(r"\[([\d,]+)\]", types)
    ]
    assert (
        max(sizes) == D * V // 2
    )  # the head gathered over fsdp; the logits of a device would be 64 times a row of V / 2
    assert not re.search(rf"\[{B // 4},{T},{V // 2}\]|\[{B * T // 4},{V // 2}\]", text)
