"""Generators: reproducible, inside their ranges, in the order the paper gives, noisy where they should be."""

import numpy as np
import pytest

from attnlab.data.combinatorial import TASKS, find_task, sample, sample_pair
from attnlab.data.combinatorial import sampling as sampling_module


def draw(text, seed=0, batch=200, length=7, **options):
    return sample(find_task(text, **options), np.random.default_rng(seed), batch, length)


@pytest.mark.parametrize("name", TASKS)
def test_equal_generators_give_equal_samples(name):
    a, b, c = draw(name), draw(name), draw(name, seed=1)
    for one, two in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(a.x, c.x)


@pytest.mark.parametrize("name", TASKS)
def test_shapes_and_types(name):
    task = find_task(name)
    s = draw(name, batch=5)
    tokens = task.tokens(7)
    assert s.x.shape == (5, tokens, task.num_features) and s.x.dtype == np.float32
    assert s.mask.shape == (5, tokens) and s.mask.all()
    assert s.y.shape == ((5, tokens) if task.per_token else (5,))
    assert s.y.dtype == (np.int32 if task.label == "classes" else np.float32)
    if s.value is not None:
        assert s.value.shape == ((5, tokens) if task.value_per_token else (5,))
        assert s.value.dtype == np.float32


@pytest.mark.parametrize("name", TASKS)
def test_sizes_of_a_range_are_padded_with_zeros(name):
    task = find_task(name)
    s = draw(name, batch=90, length=(3, 6))
    sizes = s.mask.sum(axis=1)
    assert set(sizes) == {task.tokens(n) for n in (3, 4, 5, 6)}
    assert (s.mask == (np.arange(s.x.shape[1]) < sizes[:, None])).all()
    for array in (s.x, s.y, s.value):
        if array is not None and array.ndim > 1:
            assert (array[~s.mask] == 0).all()
    for row in range(8):
        alone = task.solve(task.instance(s.x[row : row + 1, : sizes[row]]))
        label = s.y[row, : sizes[row]] if task.per_token else s.y[row]
        np.testing.assert_array_equal(alone.y[0], label)


def test_chunks_hold_all_instances(monkeypatch):
    monkeypatch.setattr(sampling_module, "CHUNK", 7)
    task = find_task("knapsack")
    s = sample(task, np.random.default_rng(0), 31, (4, 5))
    mask, best = s.y, s.value
    assert len(s.x) == 31 and set(s.mask.sum(axis=1)) == {4, 5}
    np.testing.assert_array_equal((s.x[..., 0] * mask).sum(axis=1), best)


@pytest.mark.parametrize(
    "name", ["subset_sum", "three_sum", "balanced_partition", "max_subset_sum", "min_coin_change"]
)
def test_items_ascend(name):
    assert (np.diff(draw(name).x[..., 0], axis=1) >= 0).all()


def test_order_of_knapsack_and_bin_items():
    assert (np.diff(draw("knapsack").x[..., 0], axis=1) >= 0).all()
    x = draw("bin_packing", value_range=(1, 40)).x
    assert (np.diff(x[..., 0], axis=1) <= 0).all() and (x[..., 0] <= x[..., 1]).all()
    np.testing.assert_allclose(x[0, :, 2], np.arange(7) / 6, rtol=1e-6)


@pytest.mark.parametrize("name", ["three_sum", "balanced_partition", "convex_hull", "lis"])
def test_value_range_is_used_with_both_ends(name):
    x = draw(name, batch=400, value_range=(3, 6)).x
    assert set(np.unique(x[..., 0])) == {3, 4, 5, 6}


@pytest.mark.parametrize(
    "name, column, option",
    [
        ("three_sum", 1, "target_range"),
        ("knapsack", 2, "target_range"),
        ("knapsack", 1, "weight_range"),
        ("bin_packing", 1, "target_range"),
        ("subset_sum(targets='range')", 1, "target_range"),
    ],
)
def test_target_and_weight_ranges(name, column, option):
    x = draw(name, batch=400, **{option: (12, 14)}).x
    assert set(np.unique(x[..., column])) == {12, 13, 14}


def test_subset_sum_targets_are_balanced_and_hard():
    """Solvable and unsolvable alike lie between the least and the largest sum, or up to 5 above."""
    s = draw("subset_sum", batch=2000, length=6)
    assert 0.45 < s.y.mean() < 0.55
    items, target = s.x[..., 0], s.x[:, 0, 1]
    assert (target >= np.minimum(items, 0).sum(axis=1)).all()
    largest = np.maximum(items, 0).sum(axis=1)
    assert (target <= largest + 5).all() and (target > largest).any()
    assert (target[s.y == 1] <= largest[s.y == 1]).all()


def test_coin_targets_stay_in_range_whatever_can_be_made():
    for values, length in (((1, 2), 3), ((1, 1), 30), ((5, 5), 6)):
        s = draw("min_coin_change", value_range=values, length=length)
        assert ((s.x[..., 1] >= 10) & (s.x[..., 1] <= 20)).all()
    assert (
        draw("min_coin_change", value_range=(1, 1), length=30).y.any(axis=1).all()
    )  # no other target exists
    assert 0.4 < draw("min_coin_change", batch=1000, value_range=(5, 5)).y.any(axis=1).mean() < 0.6


def test_quickselect_ranks():
    for length, ranks in ((3, {2, 3}), (40, set(range(2, 9)))):
        k = np.rint(draw("quickselect", batch=300, length=length).x[:, 0, 1] * (length - 1)) + 1
        assert set(k) == ranks
    x = draw("quickselect(value_range=(4, 4))").x
    assert (x[..., 0] == 0).all()
    assert set(draw("quickselect(largest_k=3, normalize=False)").x[:, 0, 1]) == {2, 3}


def test_places_of_sequences():
    x = draw("lis", batch=2, length=5).x
    np.testing.assert_allclose(x[1, :, 1], np.exp(np.arange(5) / 4), rtol=1e-6)
    assert (draw("lis", batch=2, length=1).x[..., 1] == 0).all()


def test_graphs_are_symmetric_without_loops_and_of_their_density():
    x = draw("floyd_warshall(edge_range=(0.5, 0.5))", batch=300, length=8).x
    weights = x[..., 0].reshape(-1, 8, 8)
    np.testing.assert_array_equal(weights, weights.transpose(0, 2, 1))
    assert (np.diagonal(weights, axis1=1, axis2=2) == 0).all()
    present = weights > 0
    assert weights[present].min() >= 1 and weights.max() <= 15.01
    assert abs(present.sum() / (300 * 56) - 0.25) < 0.02
    np.testing.assert_allclose(x[0, 11, 1:], [1 / 7, 3 / 7], rtol=1e-6)


def test_complete_graphs_take_the_smaller_of_two_weights():
    s = draw("floyd_warshall(preset='paper')", batch=50, length=5)
    weights = s.x[..., 0].reshape(-1, 5, 5)
    assert (weights == np.rint(weights)).all() and not np.array_equal(weights, weights.transpose(0, 2, 1))
    assert (s.value.reshape(-1, 5, 5) <= np.minimum(weights, weights.transpose(0, 2, 1))).all()
    assert (s.value.reshape(-1, 25)[:, 1] > 0).all()


def test_unreachable_nodes():
    s = draw("floyd_warshall(edge_range=(0.0, 0.0), value_range=(2, 9))", batch=3, length=4)
    off = ~np.eye(4, dtype=bool).reshape(-1)
    assert (s.y == 4).all() and (s.value[:, off] == 4 * 9 + 1).all() and (s.value[:, ~off] == 0).all()


def test_communities():
    dense = draw("scc(inside=1.0, across=0.0)", batch=300, length=7)
    edges = dense.x[..., 0].reshape(-1, 7, 7)
    same = dense.y.reshape(-1, 7, 7)
    off = ~np.eye(7, dtype=bool)
    np.testing.assert_array_equal(edges[:, off], same[:, off])  # communities are complete graphs
    sizes = {tuple(sorted(row.sum(axis=0))) for row in same}
    assert sizes == {(7,) * 7, (3, 3, 3, 4, 4, 4, 4), (2, 2, 2, 2, 3, 3, 3)}
    assert abs(draw("scc(inside=0.0, across=0.3)", batch=900).x[..., 0].mean() - 0.3 * 6 / 7 * 0.45) < 0.05


@pytest.mark.parametrize("name", TASKS)
def test_noise_falls_on_its_share_of_tokens_and_leaves_the_label(name):
    task = find_task(name, noise_prob=0.3)
    clean, noisy = sample_pair(task, np.random.default_rng(3), 300, 8)
    if name == "max_subset_sum":  # disturbed items are sorted again, so tokens have moved
        assert (np.diff(noisy.x[..., 0], axis=1) >= 0).all()
        np.testing.assert_array_equal(noisy.y, noisy.x[..., 0] > 0)
        assert not np.array_equal(clean.y, noisy.y)
        return
    changed = (clean.x != noisy.x).any(axis=-1)
    possible = 56 / 64 if task.tokens(8) == 64 else 1.0
    slack = 0.1 if name == "bin_packing" else 0.03  # items as large as the bin cannot grow
    assert abs(changed.mean() - 0.3 * possible) < slack
    if task.noise_before_label:
        np.testing.assert_array_equal(noisy.y, task.solve(task.instance(noisy.x)).y)
    else:
        np.testing.assert_array_equal(clean.y, noisy.y)
        if clean.value is not None:
            np.testing.assert_array_equal(clean.value, noisy.value)
    plain, same = sample_pair(find_task(name), np.random.default_rng(3), 30, 8)
    np.testing.assert_array_equal(plain.x, same.x)


@pytest.mark.parametrize(
    "name", [n for n in TASKS if n not in ("scc", "quickselect", "bin_packing", "max_subset_sum")]
)
def test_noise_range(name):
    task = find_task(name, noise_prob=1.0, noise_range=(20, 22))
    clean, noisy = sample_pair(task, np.random.default_rng(3), 100, 8)
    added = (noisy.x - clean.x)[..., 0]
    if task.tokens(8) == 64:
        added = added[:, ~np.eye(8, dtype=bool).reshape(-1)]
        assert added.min() >= 19.99 and added.max() <= 22.01
    else:
        assert set(np.unique(added)) == {20, 21, 22}


def test_special_noise():
    clean, noisy = sample_pair(find_task("quickselect(noise_prob=1.0)"), np.random.default_rng(0), 200, 8)
    added = noisy.x - clean.x
    np.testing.assert_allclose(added[..., 0], added[..., 1], atol=1e-6)  # one number on both features
    assert added.min() >= 0 and 0.9 < added.max() < 1 + 1e-6
    clean, noisy = sample_pair(find_task("scc(noise_prob=1.0)"), np.random.default_rng(0), 20, 5)
    off = ~np.eye(5, dtype=bool).reshape(-1)
    np.testing.assert_array_equal(noisy.x[:, off, 0], 1 - clean.x[:, off, 0])
    np.testing.assert_array_equal(noisy.x[:, ~off], clean.x[:, ~off])
    clean, noisy = sample_pair(find_task("bin_packing(noise_prob=1.0)"), np.random.default_rng(0), 50, 8)
    assert (noisy.x[..., 0] <= noisy.x[..., 1]).all() and (noisy.x[..., 0] >= clean.x[..., 0]).all()
    clean, noisy = sample_pair(find_task("knapsack(noise_prob=1.0)"), np.random.default_rng(0), 50, 8)
    added = noisy.x - clean.x
    assert (added[..., :2] >= 10).all() and not np.array_equal(added[..., 0], added[..., 1])
    down = find_task("knapsack(noise_prob=1.0, noise_range=(-30, -20))")
    assert (sample(down, np.random.default_rng(0), 9, 8).x[..., 1] == 1).all()


@pytest.mark.parametrize("name", TASKS)
def test_presets_make_tasks_that_can_be_drawn(name):
    for preset, options in TASKS[name].presets.items():
        task = find_task(name, preset=preset)
        assert all(getattr(task, key) == value for key, value in options.items())
        assert task != find_task(name)
        sample(task, np.random.default_rng(0), 3, 8)


def test_options_in_brackets():
    task = find_task("convex_hull(value_range=(1, 2), noise_prob=0.5)")
    assert task == find_task("convex_hull", value_range=(1, 2), noise_prob=0.5)
    assert task == find_task("convex_hull", value_range=[1, 2], noise_prob=0.5)
    assert find_task("quickselect(preset='value', value_range=(0, 3))").value_range == (0, 3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("convex_hul", "did you mean 'convex_hull'"),
        ("convex_hull(value_rang=(1, 2))", "did you mean 'value_range'"),
        ("convex_hull(preset='valu')", "did you mean 'value'"),
        ("convex_hull(1)", "not understood"),
        ("convex_hull(value_range=foo)", "not understood"),
        ("convex_hull(value_range=(5, 2))", "is empty"),
        ("convex_hull(noise_prob=1.5)", "no probability"),
        ("knapsack(weight_range=(0, 3))", "nor weights 0"),
        ("min_coin_change(value_range=(0, 3))", "must be positive"),
        ("balanced_partition(value_range=(-2, 3))", "must not be negative"),
        ("bin_packing(target_range=(0, 3))", "must be positive"),
        ("subset_sum(targets='any')", "targets='any' is unknown"),
        ("quickselect(largest_k=1)", "at least 2"),
        ("quickselect(noise_range=(1, 5))", "is fixed"),
        ("floyd_warshall(weights='any')", "weights='any' is unknown"),
        ("floyd_warshall(edge_range=(0.5, 1.5))", "must hold probabilities"),
        ("floyd_warshall(weights='complete', value_range=(0, 3))", "must be positive"),
        ("scc(inside=2)", "no probability"),
        ("scc(value_range=(1, 2))", "are fixed"),
    ],
)
def test_bad_tasks_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        find_task(text)


def test_bad_sizes_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="at least 2"):
        sample(find_task("quickselect"), rng, 3, 1)
    with pytest.raises(ValueError, match="length="):
        sample(find_task("lis"), rng, 3, (5, 4))
    with pytest.raises(ValueError, match="batch=0"):
        sample(find_task("lis"), rng, 0, 5)
    with pytest.raises(ValueError, match="no square"):
        find_task("scc").instance(np.zeros((1, 7, 3), np.float32))
