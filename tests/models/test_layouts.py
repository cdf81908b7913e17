"""Layouts of hybrids: the paper's Table 11, other depths, and the patterns they become."""

import dataclasses

import pytest

from attnlab.attention.mixer import parse_pattern
from attnlab.models.config import ModelConfig
from attnlab.models.layouts import LAYOUTS, layout, standard_layers

TABLE_11 = {  # L = 24
    "uniform": [],
    "even": [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24],
    "odd": [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23],
    "top": [*range(1, 13)],
    "middle": [*range(1, 7), *range(19, 25)],
    "bottom": [*range(13, 25)],
    "25%": [4, 8, 12, 16, 20, 24],
    "first": [1],
    "last": [24],
    "bilateral": [1, 24],
}
OTHER_DEPTHS = {
    ("top", 6): [1, 2, 3],
    ("middle", 6): [1, 5, 6],
    ("bottom", 6): [4, 5, 6],
    ("25%", 6): [4],
    ("even", 6): [2, 4, 6],
    ("top", 12): [1, 2, 3, 4, 5, 6],
    ("middle", 12): [1, 2, 3, 10, 11, 12],
    ("25%", 12): [4, 8, 12],
    ("bilateral", 12): [1, 12],
    ("middle", 7): [1, 6, 7],
    ("bottom", 7): [4, 5, 6, 7],
    ("50%", 5): [2, 4],
    ("bilateral", 1): [1],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_paper_s_table(name):
    assert sorted(standard_layers(name, 24)) == TABLE_11[name]


@pytest.mark.parametrize(("name", "num_layers"), OTHER_DEPTHS)
def test_other_depths(name, num_layers):
    assert sorted(standard_layers(name, num_layers)) == OTHER_DEPTHS[name, num_layers]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("num_layers", [4, 6, 7, 12, 24])
def test_a_layout_is_its_pattern(name, num_layers):
    config = ModelConfig(layers=layout(name, "forgetting", num_layers), num_layers=num_layers)
    names = [n for n, _ in config.layer_configs()] * config.num_periods
    found = [l for l, mixer in enumerate(names, start=1) if mixer == "softmax"]
    assert found == sorted(standard_layers(name, num_layers)) and len(names) == num_layers


def test_patterns_are_as_short_as_they_can_be_and_carry_options():
    assert layout("even", "forgetting", 24) == "forgetting + softmax"
    assert layout("25%", "forgetting", 24) == "forgetting*3 + softmax"
    assert layout("uniform", "forgetting", 24) == "forgetting"
    assert layout("bilateral", "forgetting", 24) == "softmax + forgetting*22 + softmax"
    pattern = layout("last", "forgetting(gate='none')", 3, standard="softmax(window=5)")
    assert pattern == "forgetting(gate='none')*2 + softmax(window=5)"
    assert dataclasses.asdict(parse_pattern(pattern)[2]) == {"name": "softmax", "options": (("window", 5),)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("half", "forgetting", 4), "layout 'half' is unknown; choose one of uniform"),
        (("25%", "forgetting", 3), "leaves no standard layer among 3"),
        (("even", "forgetting", 1), "leaves no standard layer among 1"),
        (("even", "forgeting", 4), "did you mean 'forgetting'"),
        (("even", "forgetting*2", 4), "several layers"),
        (("even", "forgetting", 0), "num_layers=0"),
    ],
)
def test_what_is_no_layout_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        layout(*arguments)
