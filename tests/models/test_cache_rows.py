"""The rows of every mixer's cache are found, whatever their axis."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.mixer import MIXERS
from attnlab.models.cache_rows import SHARED, place_rows, repeat_rows, row_axes
from attnlab.models.config import ModelConfig
from attnlab.models.language_model import LanguageModel
from attnlab.models.streams import StreamConfig


def model(layers: str, layer_count: int, **options) -> LanguageModel:
    streams = StreamConfig(length=9, fixed_tokens=tuple(range(9)))
    sizes = {"hidden_size": 8, "num_heads": 2, "mlp_size": 4, "vocab_size": 11}
    return LanguageModel(ModelConfig(layers, layer_count, streams=streams, **sizes, **options))


def repeated_and_larger(model: LanguageModel, starts: np.ndarray):
    """The cache for `starts` with each row three times over, and the one made for such rows."""

    def repeated(starts):
        return repeat_rows(model.init_cache(len(starts), 7, starts=starts), row_axes(model, 7), 3)

    return repeated, lambda starts: model.init_cache(3 * len(starts), 7, starts=jnp.repeat(starts, 3))


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_repeating_gives_the_shapes_of_more_rows(name):
    repeated, larger = repeated_and_larger(model(name, 1), np.array([1, 0]))
    starts = jax.ShapeDtypeStruct((2,), jnp.int32)
    assert jax.eval_shape(repeated, starts) == jax.eval_shape(larger, starts)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_rows_lie_where_the_pattern_puts_them_and_keep_their_order(scan_layers):
    mixed = model("rndemb_qk + forgetting + softmax(window=3)", 6, scan_layers=scan_layers)
    repeated, larger = repeated_and_larger(mixed, np.array([1, 0]))
    for got, want in zip(*(jax.tree.leaves(f(jnp.array([1, 0]))) for f in (repeated, larger)), strict=True):
        np.testing.assert_array_equal(got, want)
    axes = set(jax.tree.leaves(row_axes(mixed, 7)))
    assert axes == {SHARED, 1 if scan_layers else 0}, "counters and the random stream are shared"


def test_rows_without_an_axis_of_their_own_are_refused():
    def init_cache(batch, length, starts):
        return jnp.zeros((4, 2 * batch))

    with pytest.raises(ValueError, match=r"shape \(4, 4\) for two rows and \(4, 6\) for three"):
        row_axes(types.SimpleNamespace(init_cache=init_cache), 5)


def test_without_a_mesh_nothing_is_placed():
    tree = (jnp.zeros((3, 2)), jnp.zeros(3))
    assert place_rows(tree) is tree
