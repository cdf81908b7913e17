"""Every solver against exhaustive search on small instances, and its rules for ties on hand-made ones."""

import itertools

import numpy as np
import pytest

from attnlab.data.combinatorial import TASKS, find_task
from attnlab.data.combinatorial.geometry import convex_hull
from attnlab.data.combinatorial.graphs import floyd_warshall, same_component
from attnlab.data.combinatorial.knapsacks import first_fit, fractional_knapsack, knapsack, min_coin_change
from attnlab.data.combinatorial.order import increasing_length, kth_smallest
from attnlab.data.combinatorial.sums import balanced_partition, reachable_sums, subset_sum, three_sum

COUNT = 60


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def subsets(size: int) -> np.ndarray:
    """All 2^size masks."""
    return np.array(list(itertools.product((0, 1), repeat=size)))


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_subset_sum(rng, size):
    items, target = rng.integers(-6, 7, (COUNT, size)), rng.integers(-9, 10, COUNT)
    sums = items @ subsets(size).T
    found = (sums == target[:, None]).any(axis=1)
    assert 0 < found.sum() < COUNT
    np.testing.assert_array_equal(subset_sum(items, target), found)
    bits, offset = reachable_sums(items[0].tolist())
    assert {i - offset for i in range(bits.bit_length()) if bits >> i & 1} == set(sums[0].tolist())


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_three_sum_uses_three_different_places(rng, size):
    items, target = rng.integers(-4, 5, (COUNT, size)), rng.integers(-9, 10, COUNT)
    found = [
        any(sum(three) == goal for three in itertools.combinations(row, 3))
        for row, goal in zip(items.tolist(), target, strict=True)
    ]
    assert any(found) == (size >= 3)
    np.testing.assert_array_equal(three_sum(items, target), found)
    assert three_sum(np.array([[2, 2, 5]]), np.array([6])) == 0


@pytest.mark.parametrize("size", [1, 2, 6, 10])
def test_balanced_partition(rng, size):
    items = rng.integers(0, 12, (COUNT, size))
    mask, difference = balanced_partition(items)
    sums = items @ subsets(size).T
    best = np.abs(items.sum(axis=1)[:, None] - 2 * sums).min(axis=1)
    np.testing.assert_array_equal(difference, best)
    np.testing.assert_array_equal(items.sum(axis=1) - 2 * (items * mask).sum(axis=1), best)


def test_balanced_partition_takes_the_items_that_reached_a_sum_first():
    mask, difference = balanced_partition(np.array([[3, 3, 3, 3], [1, 2, 3, 6]]))
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0], [1, 1, 1, 0]])
    np.testing.assert_array_equal(difference, [0, 0])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_knapsack(rng, size):
    values, weights = rng.integers(0, 9, (COUNT, size)), rng.integers(1, 9, (COUNT, size))
    capacity = rng.integers(0, 25, COUNT)
    mask, best = knapsack(values, weights, capacity)
    fits = weights @ subsets(size).T <= capacity[:, None]
    optimum = np.where(fits, values @ subsets(size).T, 0).max(axis=1)
    np.testing.assert_array_equal(best, optimum)
    np.testing.assert_array_equal((values * mask).sum(axis=1), optimum)
    assert ((weights * mask).sum(axis=1) <= capacity).all()


def test_knapsack_prefers_early_items():
    mask, _ = knapsack(np.array([[4, 4, 4]]), np.array([[2, 2, 2]]), np.array([5]))
    np.testing.assert_array_equal(mask, [[1, 1, 0]])


@pytest.mark.parametrize("size", [1, 3, 7])
def test_fractional_knapsack(rng, size):
    """The optimum has at most one broken item: try every whole subset and every item to break."""
    values, weights = rng.integers(1, 9, (COUNT, size)), rng.integers(1, 9, (COUNT, size))
    capacity = rng.integers(1, 25, COUNT)
    shares, best = fractional_knapsack(values, weights, capacity)
    masks = subsets(size)
    room = capacity[:, None] - weights @ masks.T
    part = np.clip(room[..., None] / weights[:, None], 0, 1) * values[:, None] * (masks == 0)
    optimum = np.where(room >= 0, values @ masks.T + part.max(axis=-1), 0).max(axis=1)
    np.testing.assert_allclose(best, optimum, rtol=1e-12)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert ((weights * shares).sum(axis=1) <= capacity + 1e-9).all()


def test_fractional_knapsack_breaks_ties_in_the_order_given():
    shares, _ = fractional_knapsack(np.array([[1, 2, 4]]), np.array([[1, 2, 4]]), np.array([5]))
    np.testing.assert_array_equal(shares, [[1, 1, 0.5]])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_min_coin_change(rng, size):
    coins, target = rng.integers(1, 9, (COUNT, size)), rng.integers(1, 22, COUNT)
    mask, count = min_coin_change(coins, target)
    sums, used = coins @ subsets(size).T, subsets(size).sum(axis=1)
    fewest = np.where(sums == target[:, None], used, 99).min(axis=1)
    possible = fewest < 99
    assert 0 < possible.sum() < COUNT
    np.testing.assert_array_equal(count, np.where(possible, fewest, 0))
    np.testing.assert_array_equal(mask.sum(axis=1), count)
    np.testing.assert_array_equal((coins * mask).sum(axis=1), np.where(possible, target, 0))


def test_min_coin_change_prefers_early_coins():
    mask, _ = min_coin_change(np.array([[5, 5, 5], [3, 4, 7]]), np.array([10, 7]))
    np.testing.assert_array_equal(mask, [[1, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize("size", [1, 4, 9])
def test_first_fit(rng, size):
    capacity = rng.integers(5, 12, COUNT)
    sizes = np.minimum(rng.integers(1, 12, (COUNT, size)), capacity[:, None])
    opens, bins = first_fit(sizes, capacity)
    for row in range(COUNT):
        room, expected = [], []
        for item in sizes[row]:
            place = next((i for i, left in enumerate(room) if left >= item), None)
            expected.append(place is None)
            if place is None:
                room.append(capacity[row] - item)
            else:
                room[place] -= item
        np.testing.assert_array_equal(opens[row], expected)
        assert bins[row] == len(room)


def test_first_fit_refuses_items_larger_than_a_bin():
    with pytest.raises(ValueError, match="size 7 is larger"):
        first_fit(np.array([[7, 1]]), np.array([6]))


@pytest.mark.parametrize("size", [2, 5, 9])
def test_kth_smallest(rng, size):
    items, k = rng.integers(-5, 6, (COUNT, size)), rng.integers(1, size + 1, COUNT)
    mask, value = kth_smallest(items, k)
    for row in range(COUNT):
        assert value[row] == sorted(items[row])[k[row] - 1]
        np.testing.assert_array_equal(mask[row], items[row] == value[row])


@pytest.mark.parametrize("size", [1, 2, 7])
def test_increasing_length(rng, size):
    items = rng.integers(0, 6, (COUNT, size))
    longest = [
        max(
            int(mask.sum())
            for mask in subsets(size)
            if (np.diff(row[mask == 1]) > 0).all() and mask.sum() > 0
        )
        for row in items
    ]
    np.testing.assert_array_equal(increasing_length(items), longest)


@pytest.mark.parametrize("size, span", [(1, 3), (2, 2), (3, 2), (5, 2), (9, 4), (10, 11)])
def test_convex_hull(rng, size, span):
    """A vertex is a point outside every segment and every triangle of the other places."""
    points = rng.integers(-3, span, (COUNT, size, 2))
    mask = convex_hull(points)
    for row in range(COUNT):
        places = sorted(set(map(tuple, points[row].tolist())))
        vertices = {p for p in places if not _inside(p, [q for q in places if q != p])}
        expected = [tuple(p) in vertices for p in points[row].tolist()]
        np.testing.assert_array_equal(mask[row], expected)


def _inside(p, others):
    """Whether p lies in the hull of the other points: in one of their triangles or segments (edges included)."""

    def side(a, b):
        return (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])

    def between(a, b):
        return side(a, b) == 0 and all(min(a[i], b[i]) <= p[i] <= max(a[i], b[i]) for i in (0, 1))

    if any(between(a, b) for a, b in itertools.combinations(others, 2)):
        return True
    for a, b, c in itertools.combinations(others, 3):
        sides = side(a, b), side(b, c), side(c, a)
        if all(s > 0 for s in sides) or all(s < 0 for s in sides):
            return True
    return False


def _paths(weights):
    """Shortest distances by relaxing all edges n times from every node; weights [n, n] with inf."""
    size = len(weights)
    distance = np.where(np.eye(size, dtype=bool), 0.0, np.inf)
    for _ in range(size):
        distance = np.minimum(distance, (distance[:, :, None] + weights[None]).min(axis=1))
    return distance


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_floyd_warshall(rng, size):
    weights = rng.uniform(0.5, 9, (COUNT, size, size))
    weights[rng.random(weights.shape) < 0.6] = np.inf
    distance, before = floyd_warshall(weights)
    for row in range(COUNT):
        np.testing.assert_allclose(distance[row], _paths(weights[row]), rtol=1e-12)
        for i, j in itertools.product(range(size), repeat=2):
            k = before[row, i, j]
            if i == j or np.isinf(distance[row, i, j]):
                assert k == size
            else:
                np.testing.assert_allclose(distance[row, i, k] + weights[row, k, j], distance[row, i, j])


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_same_component(rng, size):
    edges = rng.random((COUNT, size, size)) < 0.25
    same = same_component(edges)
    reach = np.isfinite([_paths(np.where(each, 1.0, np.inf)) for each in edges])
    np.testing.assert_array_equal(same, reach & reach.transpose(0, 2, 1))


@pytest.mark.parametrize("name", TASKS)
def test_features_hold_the_instance(rng, name):
    """Integers -> float32 features -> integers gives the same labels, and the same values where units are kept."""
    task = find_task(name)
    size = 6
    instance = task.draw(rng, COUNT, size)
    x = task.features(instance)
    assert x.shape == (COUNT, task.tokens(size), task.num_features) and x.dtype == np.float32
    direct, back = task.solve(instance), task.solve(task.instance(x))
    np.testing.assert_array_equal(back.y, direct.y)
    assert direct.y.ndim == 1 + task.per_token
    assert (direct.value is None) == (task.value_per_token is None)
    if direct.value is not None and name != "quickselect":
        np.testing.assert_array_equal(back.value, direct.value)


def test_raw_quickselect_features_keep_the_units(rng):
    task = find_task("quickselect(normalize=False)")
    instance = task.draw(rng, COUNT, 7)
    back = task.instance(task.features(instance))
    for name, values in instance.items():
        np.testing.assert_array_equal(back[name], values)
