"""Learning-rate schedules by hand-computed values."""

import numpy as np
import pytest

from attnlab.training.schedules import ScheduleConfig, make_schedule


def rates(steps=100, **options):
    schedule = make_schedule(ScheduleConfig(peak=2.0, **options), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_warmup_starts_at_zero_and_reaches_the_peak():
    for shape in ("cosine", "linear", "constant", "1-sqrt"):
        values = rates(shape=shape, warmup_steps=10)
        np.testing.assert_allclose(values[:11], np.linspace(0, 2, 11), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("cosine", {55: 1.1, 100: 0.2}),  # half-way between peak and a tenth of it
        ("linear", {55: 1.1, 100: 0.2}),
        ("constant", {55: 2.0, 100: 2.0}),
        ("1-sqrt", {60: 2.0, 80: 2.0, 85: 0.2 + 1.8 * 0.5, 100: 0.2}),  # a quarter into the last 20 steps
    ],
)
def test_the_way_down(shape, expected):
    values = rates(shape=shape, warmup_steps=10, final_fraction=0.1, decay_fraction=0.2)
    for step, value in expected.items():
        assert values[step] == pytest.approx(value, rel=1e-5), step


def test_decay_fraction_sets_where_the_rate_begins_to_fall():
    values = rates(shape="1-sqrt", warmup_steps=0, decay_fraction=0.5)
    assert values[50] == 2.0 and values[51] < 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "cos"}, "shape='cos' is unknown"),
        ({"peak": 0.0}, "peak=0.0 must be positive"),
        ({"warmup_steps": 50}, "warmup_steps=50 must be at least 0 and below training.steps=50"),
        ({"final_fraction": 2.0}, "final_fraction=2.0"),
        ({"decay_fraction": 0.0}, "decay_fraction=0.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**({"warmup_steps": 1} | options)).validate(50)
