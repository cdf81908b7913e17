"""The table of mechanisms, made from the registry: python -m attnlab.models.mechanisms > docs/mechanisms.md

Letters: B batch, T length, C channels, H heads, K key/value heads, D head size.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from attnlab.attention import MIXERS, MixerConfig

CHANNELS, HEADS, LENGTH, LONGER = 768, 12, 1024, 8192

INTRODUCTION = f"""# Mechanisms

Every mechanism is a layer for `model.layers` patterns, under the name in the first column. Made by
`python -m attnlab.models.mechanisms > docs/mechanisms.md` from the registry; the tests compare.

One layer with C = {CHANNELS} channels and H = {HEADS} heads of 64, options at their defaults (tables and fixed
lengths set to {LENGTH} positions). Parameters exclude MLP and embedding; those never trained are given apart.
Training cost: matrix-product FLOPs a token, forward, at T = {LENGTH} (backward takes twice as much), and the factor to
T = {LONGER}, near 1 for linear-time mechanisms. Decode state: numbers a sequence's cache holds after {LENGTH}
positions, and the factor to {LONGER}. Implementations: of the operation underneath, the default first.
"""

HEADER = (
    "mechanism",
    "paper",
    "parameters",
    "training MFLOPs a token",
    "decode state",
    "masks besides causal",
    "implementations",
)


def table() -> str:
    """The page, in Markdown."""
    rows = [HEADER, ("---",) * len(HEADER), *(_row(name) for name in sorted(MIXERS))]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{INTRODUCTION}\n{lines}\n"


def _row(name: str) -> tuple[str, ...]:
    mixer, config = MIXERS[name], layer_config(name)
    flops, longer_flops = (mixer.forward_flops(config, CHANNELS, (n + 1) / 2) for n in (LENGTH, LONGER))
    state, longer_state = (mixer.state_size(config, n) for n in (LENGTH, LONGER))
    return (
        f"`{name}`",
        mixer.paper,
        _parameters(name),
        f"{flops / 1e6:.2f} (x{longer_flops / flops:.1f})" if flops else "0",
        f"{state:,} (x{longer_state / state:.1f})" if state else "0",
        ", ".join(mask for mask in mixer.masks if mask != "causal"),
        ", ".join(each.name for each in mixer.implementations) or "one",
    )


def layer_config(name: str) -> MixerConfig:
    """Default options at the table's size."""
    options = MIXERS[name].Config()
    if "max_length" in {field.name for field in dataclasses.fields(options)}:
        options = dataclasses.replace(options, max_length=LENGTH)
    return options.resolve(HEADS, 0, 0, CHANNELS)


def parameter_counts(name: str) -> tuple[int, int]:
    """Trained and never trained parameters of one layer of the mixer `name`, at the table's size."""
    module = MIXERS[name](config=layer_config(name), hidden_size=CHANNELS)
    x, positions = jax.ShapeDtypeStruct((1, 2, CHANNELS), jnp.float32), jnp.arange(2)[None]
    init = functools.partial(module.init, positions=positions)
    tree = jax.eval_shape(init, jax.random.key(0), x)
    leaves = [
        (jax.tree_util.keystr(path), math.prod(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    frozen = sum(size for path, size in leaves if "['frozen_" in path)
    return sum(size for _, size in leaves) - frozen, frozen


def _parameters(name: str) -> str:
    trained, frozen = parameter_counts(name)
    return f"{trained:,}" + (f" (+ {frozen:,} fixed)" if frozen else "")


if __name__ == "__main__":
    print(table(), end="")
