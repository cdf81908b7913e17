"""What can be trained: data, model and objective of a configuration as one `attnlab.training.task.Task`, a file a task.

This is where the rooms meet. Nothing else knows of two of them at once, and the trainer knows nothing of tasks.
"""

from attnlab.tasks.grpo import GRPOTask
from attnlab.tasks.language_modelling import LanguageModellingTask

TASKS = {"language_modelling": LanguageModellingTask.open, "grpo": GRPOTask.open}

__all__ = ["TASKS", "GRPOTask", "LanguageModellingTask"]
