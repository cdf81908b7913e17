"""Which level of problems comes next: up where most are solved, down where few are. Pure functions of plain numbers."""


def start(up: float, down: float) -> float:
    """The running mean of success that leads neither up nor down: midway."""
    return (up + down) / 2


def advance(
    level: int, mean: float, success: float, *, num_levels: int, decay: float, up: float, down: float
) -> tuple[int, float]:
    """(level, mean) after a batch of which the fraction `success` was solved.

        mean' = decay * mean + (1 - decay) * success

    The level rises by one when mean' > up and falls by one when mean' < down, within 1..num_levels; the mean then
    begins anew, midway, so that each level is judged by its own problems. A success that is NaN (nothing could be
    scored) changes nothing.
    """
    if success != success:
        return level, mean
    mean = decay * mean + (1 - decay) * success
    change = (mean > up) - (mean < down)
    new = min(max(level + change, 1), num_levels)
    return (new, start(up, down)) if new != level else (level, mean)
