"""The combinatorial tasks of Tropical Attention (arXiv 2505.17190) by name, with generators and exact solvers in NumPy.

    task = find_task("quickselect(value_range=(11, 21), noise_prob=0.5)")
    x, y, value, mask = sample(task, np.random.default_rng(0), batch=500, length=8)
Eleven tasks of the paper, and `lis` and `max_subset_sum` of its code.
"""

import dataclasses

from attnlab.data.combinatorial.geometry import ConvexHull
from attnlab.data.combinatorial.graphs import SCC, FloydWarshall
from attnlab.data.combinatorial.knapsacks import BinPacking, FractionalKnapsack, Knapsack, MinCoinChange
from attnlab.data.combinatorial.order import LIS, Quickselect
from attnlab.data.combinatorial.sampling import Sample, sample, sample_pair
from attnlab.data.combinatorial.sums import BalancedPartition, MaxSubsetSum, SubsetSum, ThreeSum
from attnlab.data.combinatorial.task import Solution, Task
from attnlab.data.specs import known, read_spec

TASKS: dict[str, type[Task]] = {
    "convex_hull": ConvexHull,
    "knapsack": Knapsack,
    "quickselect": Quickselect,
    "bin_packing": BinPacking,
    "scc": SCC,
    "subset_sum": SubsetSum,
    "balanced_partition": BalancedPartition,
    "three_sum": ThreeSum,
    "min_coin_change": MinCoinChange,
    "floyd_warshall": FloydWarshall,
    "fractional_knapsack": FractionalKnapsack,
    "max_subset_sum": MaxSubsetSum,
    "lis": LIS,
}


def find_task(text: str, **options) -> Task:
    """The task written as a name, or as a name with options in brackets, such as "scc(preset='paper', across=0.1)".

    `preset` names a set of options of the task's `presets`; options given beside it, in the brackets or as arguments,
    win. ValueError with the nearest name for an unknown task, preset or option.
    """
    name, given = read_spec(text, "task", "'scc' or 'scc(inside=0.1)'")
    options = given | options
    cls = TASKS[known(name, TASKS, "task")]
    preset = options.pop("preset", None)
    if preset is not None:
        options = cls.presets[known(preset, cls.presets, f"preset of {name}")] | options
    for option in options:
        known(option, [field.name for field in dataclasses.fields(cls)], f"option of {name}")
    return cls(**options)


__all__ = ["TASKS", "Sample", "Solution", "Task", "find_task", "sample", "sample_pair"]
