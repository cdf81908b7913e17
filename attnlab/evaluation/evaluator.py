"""The contract of all evaluators: `run(context, config) -> Result`, one evaluator a file, found by name.

An evaluator measures parameters; it knows nothing of training. Every process of a multi-host job calls it alike and
gets the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from jax.sharding import Mesh
from matplotlib.figure import Figure

from attnlab.data.sources import DocumentSource
from attnlab.data.tokenizers import Tokenizer
from attnlab.evaluation.config import EvalConfig
from attnlab.objectives.language_modelling import LanguageModelling

if TYPE_CHECKING:
    from attnlab.config import Experiment  # which imports this folder's options


@dataclasses.dataclass(frozen=True)
class Context:
    """What is evaluated and where: the parameters lie on `mesh`; `experiment` says how they were trained."""

    experiment: Experiment
    objective: LanguageModelling
    params: Any
    mesh: Mesh
    tokenizer: Tokenizer
    step: int | None = None  # training steps behind the parameters, for the record
    split: str = ""  # of the data; "": data.eval_split
    source: DocumentSource | None = None  # documents to read instead of those of data.source

    @property
    def split_name(self) -> str:
        return self.split or self.experiment.data.eval_split


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluator found.

    scalars: the numbers to compare; the standard error of `x`, where there is one, is `x_se`.
    rows: a table, every row with the same columns. figure: draws it, or None. text: to be read by people, or "".
    name and about (step, split, options) say what was measured; `run` fills them in.
    """

    scalars: dict[str, float]
    rows: Sequence[dict[str, Any]] = ()
    figure: Callable[[], Figure] | None = None
    text: str = ""
    name: str = ""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


class Evaluator(Protocol):
    """Measures context.params as `config` says; ValueError, in one sentence, when that cannot be done."""

    def __call__(self, context: Context, config: EvalConfig) -> Result: ...
