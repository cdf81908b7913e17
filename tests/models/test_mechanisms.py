"""The generated page of mechanisms is the registry's."""

from pathlib import Path

from attnlab.attention.mixer import MIXERS
from attnlab.models.mechanisms import parameter_counts, table

PAGE = Path(__file__).parents[2] / "docs" / "mechanisms.md"


def test_page_is_up_to_date():
    assert PAGE.read_text() == table(), "run: python -m attnlab.models.mechanisms > docs/mechanisms.md"


def test_every_mechanism_is_described():
    for name, mixer in MIXERS.items():
        assert mixer.paper and "causal" in mixer.masks, name
        assert f"| `{name}` | {mixer.paper} |" in PAGE.read_text()


def test_parameters_are_the_known_ones():
    projections = 4 * 768 * 768
    assert parameter_counts("softmax") == (projections, 0)
    assert parameter_counts("forgetting") == (projections + 768 * 12 + 12, 0)
