"""Which layers of a hybrid stay standard: the named layouts of Deconstructing Attention (arXiv 2510.11602, Table 11).

Letters: L layers, numbered from 1 as in the paper. A layout names the layers that stay standard (softmax attention);
all others are of the replacing kind.
"""

import itertools

from attnlab.attention.mixer import LayerSpec, parse_pattern, shortest_period

LAYOUTS = {
    "uniform": lambda L: set(),
    "even": lambda L: {
        l for l in range(1, L + 1) if l % 2 == 0
    },  # "50%", the hybrid of the paper's main table
    "odd": lambda L: {l for l in range(1, L + 1) if l % 2 == 1},
    "top": lambda L: set(range(1, L // 2 + 1)),  # the upper half is replaced
    "middle": lambda L: set(range(1, L // 4 + 1)) | set(range(3 * L // 4 + 1, L + 1)),  # the middle half is
    "bottom": lambda L: set(range(L // 2 + 1, L + 1)),  # the lower half is, as in Table 11 (the text differs)
    "25%": lambda L: {l for l in range(1, L + 1) if l % 4 == 0},
    "first": lambda L: {1},
    "last": lambda L: {L},
    "bilateral": lambda L: {1, L},
}
SYNONYMS = {"50%": "even"}


def standard_layers(name: str, num_layers: int) -> frozenset[int]:
    """The standard layers (from 1) of the layout called `name`; ValueError for an unknown one, or one without any."""
    name = SYNONYMS.get(name, name)
    if name not in LAYOUTS:
        known = ", ".join([*LAYOUTS, *SYNONYMS])
        raise ValueError(f"layout {name!r} is unknown; choose one of {known}")
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers} must be at least 1")
    found = frozenset(LAYOUTS[name](num_layers))
    if not found and name != "uniform":
        raise ValueError(
            f"layout {name!r} leaves no standard layer among {num_layers}; choose another layout or more layers"
        )
    return found


def layout(name: str, kind: str, num_layers: int, standard: str = "softmax") -> str:
    """The pattern of the layout `name`: layers of `kind`, a mixer with or without options, among standard ones.

    layout("even", "nonapprox", 24) == "nonapprox + softmax": the shortest pattern that num_layers repeats.
    ValueError for an unknown layout, or a kind that is not one mixer.
    """
    for text in (kind, standard):
        if len(parse_pattern(text)) != 1:
            raise ValueError(f"{text!r} is a pattern of several layers; give one mixer")
    kept = standard_layers(name, num_layers)
    names = tuple(LayerSpec(standard if l in kept else kind) for l in range(1, num_layers + 1))
    runs = [(spec.name, len(list(run))) for spec, run in itertools.groupby(shortest_period(names))]
    return " + ".join(text if count == 1 else f"{text}*{count}" for text, count in runs)
