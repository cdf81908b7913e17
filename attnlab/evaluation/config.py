"""Options of all evaluators, as plain values that a config file or a command line can set."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How much is evaluated and how text is sampled; 0 where "derive it" is meant."""

    batches: int = 16  # held-out batches of each evaluation, during and after training; 0: the whole split
    batch_size: int = 0  # rows of the global batch; 0: data.batch_size
    sequence_length: int = 0  # tokens per row of held_out; 0: data.sequence_length

    per_position_length: int = 0  # tokens read of each document; 0: 4 x data.sequence_length
    per_position_documents: int = 256  # held-out documents of at least that length; 0: all there are
    per_position_smoothing: int = 101  # tokens of the centred moving average in the figure (odd)

    sample_prompt: str = "def "  # sampled text begins with this
    sample_tokens: int = 200  # new tokens of each sample, fewer where the document ends before
    sample_max_length: int = (
        32768  # most positions of prompt and sample together, more is refused; 0: no limit
    )
    samples: int = 2  # completions of each prompt
    sample_seed: int = 0  # same seed, same text
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # sample among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this much probability; 1: among all

    problems: int = (
        128  # held-out problems, each answered once greedily and problem_samples times by sampling
    )
    problem_samples: int = 8
    pass_at: tuple[int, ...] = (1, 4, 8)  # k of pass@k and majority@k, at most problem_samples
    problem_level: int = 0  # of problems that have levels; 0: their own

    def validate(self) -> None:
        """Raise ValueError with the offending value."""
        least = {
            "per_position_smoothing": 1,
            "sample_tokens": 1,
            "samples": 1,
            "problems": 1,
            "problem_samples": 1,
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < least.get(field.name, 0):
                raise ValueError(f"eval.{field.name}={value} must be at least {least.get(field.name, 0)}")
        if self.per_position_smoothing % 2 == 0:
            raise ValueError(
                f"eval.per_position_smoothing={self.per_position_smoothing} must be odd, so that the average is "
                "centred; add 1"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"eval.temperature={self.temperature} must be at least 0 and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"eval.top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens")
        if not self.pass_at or not all(1 <= k <= self.problem_samples for k in self.pass_at):
            raise ValueError(
                f"eval.pass_at={self.pass_at} must hold numbers from 1 to eval.problem_samples={self.problem_samples}"
            )
