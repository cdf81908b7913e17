"""The GRPO benchmark's result as rows and as a table."""

import statistics
from collections.abc import Sequence

from benchmarks.grpo_setup import Seconds, Size

COLUMNS = (
    "side",
    "parameters",
    "steps",
    "rollout_tokens_per_second",
    "update_tokens_per_second",
    "rollout_seconds",
    "update_seconds",
    "other_seconds",
    "step_seconds",
    "first_step_seconds",
)
HEADER = """# A GRPO step{beside}

{machine}.
A decoder of {layers} layers, width {hidden_size}, {heads} heads, inner width {inner_size}, vocabulary {vocabulary};
{counts}.
{prompts} prompts of {prompt_tokens} tokens, {group} completions of each with exactly {new_tokens} new tokens,
one update a rollout, no reference policy. Medians of {steps} steps{turns} after {warmup} others; the first of
those, with what is compiled in it, has a column. Rollout: tokens drawn. Update: tokens read, prompts included;
forward, backward and optimiser. Other: prompts, texts, rewards, advantages.{note}

| | rollout tokens/s | update tokens/s | rollout s | update s | other s | step s | first step s |
|---|---|---|---|---|---|---|---|
"""


def row(side: str, parameters: int, steps: Sequence[Seconds], warmup: int, size: Size) -> dict:
    """Medians of one side's steps, the first `warmup` left out."""
    warm = steps[warmup:]
    rollout, update, step = (statistics.median(part) for part in zip(*warm, strict=True))
    other = statistics.median(s.step - s.rollout - s.update for s in warm)
    values = (
        side,
        parameters,
        len(warm),
        round(size.drawn / rollout),
        round(size.read / update),
        *(round(seconds, 5) for seconds in (rollout, update, other, step, steps[0].step)),
    )
    return dict(zip(COLUMNS, values, strict=True))


def ratios(steps: Sequence[Seconds], others: Sequence[Seconds], warmup: int) -> Seconds:
    """Medians of the second side's time over the first's, turn by turn, so that a drift of the machine drops out."""
    turns = list(zip(steps, others, strict=True))[warmup:]
    return Seconds(*(statistics.median(b[n] / a[n] for a, b in turns) for n in range(len(Seconds._fields))))


def markdown(
    rows: Sequence[dict], against: Seconds | None, size: Size, machine: str, warmup: int, note: str = ""
) -> str:
    """A line a side, and with two of them the second's times over the first's; `note`: a sentence for the reader."""
    several = len(rows) > 1
    found = HEADER.format(
        **{name: getattr(size, name) for name in size.__dataclass_fields__},
        inner_size=size.inner_size,
        beside=f" beside that of {rows[1]['side']}" if several else "",
        machine=machine,
        counts=", ".join(f"{each['parameters']} parameters in {each['side']}" for each in rows),
        steps=rows[0]["steps"],
        turns=", the sides taking turns," if several else "",
        warmup=warmup,
        note=f"\n\n{note}" if note else "",
    )
    for each in rows:
        rates = [f"{each[name]:,}".replace(",", " ") for name in COLUMNS[3:5]]
        found += _line(
            each["side"], *rates, *(f"{each[name]:.4f}" for name in COLUMNS[5:-1]), f"{each[COLUMNS[-1]]:.1f}"
        )
    if against is not None:
        rollout, update, step = (f"{ratio:.2f} x" for ratio in against)
        found += _line(
            f"time of {rows[1]['side']} over {rows[0]['side']}", "", "", rollout, update, "", step, ""
        )
    return found


def _line(*cells):
    return "| " + " | ".join(cells) + " |\n"
