"""Every parameter has a place, and what does not fit is an error with its numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.attention import MIXERS
from attnlab.attention.forgetting import PRO, ForgettingConfig
from attnlab.attention.softmax import SoftmaxConfig
from attnlab.models.config import ModelConfig
from attnlab.models.language_model import LanguageModel
from attnlab.models.streams import StreamConfig
from attnlab.training.sharding import MeshConfig, describe, make_mesh, spec_of, tree_shardings
from attnlab.training.trees import named_leaves

MESH = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])


def shapes(**options):
    mixers = {
        "forgetting": ForgettingConfig(**PRO),
        "softmax": SoftmaxConfig(qk_norm=True),
    }
    layers = "forgetting + forgetting(gate='bias_only') + softmax"
    sizes = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "mlp_size": 64, "vocab_size": 64}
    config = ModelConfig(layers=layers, mixers=mixers, **sizes, **options)
    return jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))[
        "params"
    ]


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_is_covered_and_matrices_are_cut_up(scan_layers):
    params = shapes(scan_layers=scan_layers)
    specs = named_leaves(tree_shardings(params, MESH))
    assert specs.keys() == named_leaves(params).keys()
    stack = (None,) if scan_layers else ()
    layer = "layers/blocks_0" if scan_layers else "layers_0/blocks_0"
    assert specs["embedding"].spec == P("tensor", "fsdp")
    assert specs["head"].spec == P("fsdp", "tensor")
    assert specs[f"{layer}/mixer/query/kernel"].spec == P(*stack, "fsdp", "tensor")
    assert specs[f"{layer}/mixer/out/kernel"].spec == P(*stack, "tensor", "fsdp")
    assert specs[f"{layer}/mlp/down/kernel"].spec == P(*stack, "tensor", "fsdp")
    for name, place in specs.items():
        if name.endswith("kernel") or name in ("embedding", "head"):
            assert "fsdp" in place.spec, name


def variants(name):
    """Default options of a mixer, and each of its switches turned over where that is allowed."""
    options = MIXERS[name].Config()
    yield options
    for field in dataclasses.fields(options):
        if isinstance(field.default, bool):
            try:
                changed = dataclasses.replace(options, **{field.name: not field.default})
                changed.resolve(4, 0, 8, 32)
            except ValueError:
                continue  # goes with another option only
            yield changed


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_parameter_of_every_mechanism_is_covered(name):
    streams = StreamConfig(length=8, fixed_tokens=tuple(range(8)))
    for options in variants(name):
        config = ModelConfig(
            layers=name,
            num_layers=1,
            hidden_size=32,
            num_heads=4,
            vocab_size=64,
            mixers={name: options},
            streams=streams,
        )
        params = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        places = named_leaves(tree_shardings(params, MESH))
        assert places.keys() == named_leaves(params).keys()


def test_optimizer_moments_follow_their_parameters():
    spec = spec_of("opt_state/1/mu/layers/blocks_0/mixer/query/kernel", (2, 32, 32), MESH)
    assert spec == P(None, "fsdp", "tensor")
    assert spec_of("opt_state/1/count", (), MESH) == P()


def test_uncovered_and_indivisible_parameters_are_errors():
    with pytest.raises(
        ValueError, match=r"no sharding rule covers parameter 'layers/slots' of shape \(8, 8\)"
    ):
        spec_of("layers/slots", (8, 8), MESH)
    with pytest.raises(ValueError, match="cannot be cut into 4 along 6 for mesh axis 'fsdp'"):
        spec_of("mixer/query/kernel", (6, 8), MESH)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), (1, 2, 2, 2)),
    ],
)
def test_mesh_shapes(config, shape):
    assert config.shape(8) == shape
    assert tuple(make_mesh(config, jax.devices()[:8]).shape.values()) == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "does not fill 8 devices"),
        (MeshConfig(tensor=3), "does not fill 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one -1"),
        (MeshConfig(data=0), "sizes of at least 1"),
    ],
)
def test_wrong_device_counts_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config.shape(8)


def test_describe_counts_what_a_device_holds():
    params = {"query": {"kernel": jax.ShapeDtypeStruct((32, 32), jnp.float32)}}
    assert describe(params, MESH).startswith("1,024 parameters, 128 a device on mesh data 1 x fsdp 4")
