"""What is measured of a trained model: one evaluator per file, all with the contract of `evaluator.py`."""

from attnlab.evaluation.config import EvalConfig
from attnlab.evaluation.evaluator import Context, Evaluator, Result
from attnlab.evaluation.files import write
from attnlab.evaluation.registry import EVALUATORS, find_evaluator, run

__all__ = ["EVALUATORS", "Context", "EvalConfig", "Evaluator", "Result", "find_evaluator", "run", "write"]
