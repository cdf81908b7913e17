"""Instances of the combinatorial tasks of Tropical Attention: labels and optimal values, solved from the features.

Features hold the integers of an instance, so everything is recomputed from x alone, with one exception: normalised
Quickselect features determine the k-th smallest item only up to the unit and the zero of the items. There the value
must be one that some instance of the file's value range with exactly these features has; the nearest one is compared.
"""

import re

import numpy as np

from attnlab.data.combinatorial import TASKS, Solution, find_task
from tests.golden.registry import Golden, Unsupported, family

OPTIONS = ("value_range", "target_range", "weight_range")


def _normal(name: str) -> str:
    return re.sub(r"(decision|dataset)$", "", name.lower().replace("_", ""))


NAMES = {_normal(name): name for name in TASKS}


def task_name(golden: Golden) -> str | None:
    """The task of a file, from the class named in its source, or from its case."""
    meta = golden.meta
    words = re.findall(r"dataloaders\.(\w+)", str(meta.get("source", "")))
    words += [str(meta.get("case", "")).removeprefix("data_"), str(meta.get("task", ""))]
    return next((NAMES[_normal(word)] for word in words if _normal(word) in NAMES), None)


def is_data(golden: Golden) -> bool:
    return any(re.fullmatch(r"in\.x_n\d+|in\.noise_clean_x", key) for key in golden.arrays)


@family("combinatorial task", when=is_data, tolerance=1e-6)
def data(golden: Golden):
    name = task_name(golden)
    if name is None:
        raise Unsupported(f"the task of source {golden.meta.get('source')!r} is not known")
    settings = golden.meta.get("settings", {})
    fields = TASKS[name].__dataclass_fields__
    options = {
        key: tuple(settings[key])
        for key in OPTIONS
        if key in fields and isinstance(settings.get(key), list | tuple)
    }
    if name == "subset_sum":  # its target range was read by the oldest generator alone
        options.pop("target_range", None)
    task = find_task(name, **options)
    results = {}
    for key, x in golden.expected("in.x").items():
        results |= _solved(golden, task, x, f"out.y{key}", f"out.yreg{key}")
    if "in.noise_clean_x" in golden.arrays:
        x = golden.arrays["in.noise_noisy_x" if task.noise_before_label else "in.noise_clean_x"]
        results |= _solved(golden, task, x, "out.noise_y", "out.noise_yreg")
    yield "solver", results


def _solved(golden: Golden, task, x, label_key, value_key) -> dict:
    solution = task.solve(task.instance(x))
    if type(task).__name__ == "Quickselect" and value_key in golden.arrays:
        solution = Solution(solution.y, _nearest_values(task, x, solution.y, golden.arrays[value_key]))
    found = {label_key: solution.y, value_key: solution.value}
    return {
        key: _as_stored(array, golden.arrays[key])
        for key, array in found.items()
        if array is not None and key in golden.arrays
    }


def _as_stored(array, stored):
    """Solved numbers in the stored shape ([N] may be [N, 1]); in the stored type too if nothing is lost by that."""
    array = array.reshape(stored.shape) if array.size == stored.size else array
    return array.astype(stored.dtype) if np.array_equal(array.astype(stored.dtype), array) else array


def _nearest_values(task, x, y, wanted):
    """Of all values the k-th smallest can have under the features, the nearest to `wanted`; NaN if there is none."""
    low, high = task.value_range
    values = np.full(len(x), np.nan, np.float32)
    for row, (features, marks) in enumerate(zip(x[..., 0].astype(np.float64), y, strict=True)):
        share = features[marks > 0][0]
        spans = range(1, high - low + 1) if features.max() > 0 else (0,)
        fitting = [span for span in spans if np.abs(features * span - np.rint(features * span)).max() < 1e-4]
        allowed = [least + np.rint(share * span) for span in fitting for least in range(low, high - span + 1)]
        if allowed:
            values[row] = min(allowed, key=lambda value: abs(value - wanted.reshape(-1)[row]))
    return values
