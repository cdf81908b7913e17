"""Names of the leaves of a tree, the same everywhere: in sharding rules, decay masks, checkpoints and messages."""

import jax


def path_name(path) -> str:
    """A key path as "layers/blocks_0/mixer/query/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree) -> dict[str, jax.Array]:
    """Leaves by name."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
