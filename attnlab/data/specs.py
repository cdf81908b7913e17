"""Specs: things of the data pipeline by name, with options in brackets, such as "quickselect(noise_prob=0.5)"."""

import ast
import difflib
from collections.abc import Iterable
from typing import Any


def read_spec(text: str, what: str, example: str) -> tuple[str, dict[str, Any]]:
    """(name, options) of "NAME" or "NAME(OPTION=VALUE, ..)"; the values are Python's literals, and nothing is run.

    ValueError in one sentence, naming `what` it should have been and an `example`, if the text is neither.
    """
    try:
        node = ast.parse(text, mode="eval").body
        call = node if isinstance(node, ast.Call) and not node.args else ast.Call(node, [], [])
        return call.func.id, {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AttributeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{what} {text!r} is not understood; write one like {example}") from error


def known(name: str, names: Iterable[str], what: str) -> str:
    """`name`, or ValueError with the nearest of the `names` if it is none of them."""
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"
    raise ValueError(f"unknown {what} {name!r}; {hint}")
