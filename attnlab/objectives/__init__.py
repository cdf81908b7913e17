"""What is optimised: pure functions (params, batch, rng) -> Terms. The trainer knows nothing else of a task."""

from attnlab.objectives.objective import Objective, Terms, add_terms, average

__all__ = ["Objective", "Terms", "add_terms", "average"]
