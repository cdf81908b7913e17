"""A model with its layers laid out one by one instead of scanned: the same function of other arrays.

Decoding is faster so, as each layer's cache is updated in place rather than taken out of a stack for every token; it
costs a second copy of the layers' parameters while it lasts, and longer compilation.
"""

import dataclasses
from typing import Any

import jax

from attnlab.models.language_model import LanguageModel


def unrolled(model: LanguageModel, params: Any) -> tuple[LanguageModel, Any]:
    """(model with scan_layers=False, its parameters); what is unrolled already comes back as it is. Traceable."""
    if not model.config.scan_layers:
        return model, params
    config = dataclasses.replace(model.config, scan_layers=False)
    periods = {
        f"layers_{index}": jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        for index in range(config.num_periods)
    }
    return LanguageModel(config), {name: leaf for name, leaf in params.items() if name != "layers"} | periods
