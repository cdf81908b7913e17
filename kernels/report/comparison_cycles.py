"""How often each stretch of an attention kernel's schedule runs, and so the cycles of it; nothing is run.

A count is for one query head. Letters: n blocks, G query heads a key/value head.

    inside the first loop of our kernels    once a visited piece of a block with masked pairs, but for the first piece
    inside the second                       once a visited piece of a block without
    products before or behind the loops     once a fetch with blocks to visit: its first piece, the end of its last
    a conditional start or finish           once a block of queries (dk, dv: of keys; what is done for a whole group
                                            1/G times that)
    all else in the grid's loop             once a grid step (fetches by DMA that are skipped included: a little much)

JAX's splash and flash attention kernels have another structure, known by reading them: one grid step a pair of blocks,
also of those above the diagonal; zeroing once a block, the block's products wherever a pair is visible, then the result
once a block. A schedule that looks otherwise raises ValueError.

Left out everywhere, as memory's: copies of a block from one place on the chip to another, where the compiler keeps a
whole operand there; and, for the listing gives them no loop, the slots behind a branch (under 0.5 %).
"""

from collections.abc import Sequence
from typing import NamedTuple

from kernels.report import schedule

VECTOR = 16  # slots of vector work that make a stretch a kernel's own, not the grid's bookkeeping


class Counts(NamedTuple):
    """How often, for one query head: grid steps, `ends` (conditional starts and finishes), masked and clear blocks.

    Of our kernels masked and clear are the rounds of the two loops. parts: how many conditional parts there are before
    and behind the products if `ends` differs from `steps`; walks: grid steps of our kernels with blocks to visit.
    """

    steps: float
    ends: float
    masked: float
    clear: float
    parts: int = 1
    walks: float = 0


def conditional(stretches: Sequence[schedule.Stretch]) -> list[int]:
    """Places, in the grid's loop, of vector work that a branch can jump over: no label before it, its end behind it."""
    inner = [place for place, each in enumerate(stretches) if each.depth]
    return [
        here
        for here, behind in zip(inner, inner[1:], strict=False)
        if (stretches[here].depth, stretches[here].label) == (1, "")
        and stretches[behind].label == "PF"
        and _vector(stretches[here])
        and not _copies(stretches[here])
    ]


def cycles_of_loops(stretches: Sequence[schedule.Stretch], counts: Counts) -> float:
    """Cycles of one of our kernels: a loop over masked pieces, then one over clear ones, in the grid's loop."""
    trips, loop = {}, -1
    optional = [place for place in conditional(stretches) if not stretches[place].mxu]
    looped = [place for place, each in enumerate(stretches) if each.depth > 1]
    for place, each in enumerate(stretches):
        if each.depth == 1 and not _copies(each):
            trips[place] = counts.walks if each.mxu else counts.ends if place in optional else counts.steps
        elif each.depth > 1:
            loop += each.label == "LB"
            trips[place] = (counts.masked, counts.clear)[loop] if loop in (0, 1) else None
    inner = [
        each for each in schedule.loops(stretches) if each[0].depth > 1
    ]  # not the grid's, up to a branch
    if None in trips.values() or loop != 1 or len(inner) != 2:
        raise ValueError(f"{loop + 1} loops in the schedule; two with products were expected")
    if counts.ends != counts.steps:
        around = [sum(p < looped[0] for p in optional), sum(p > looped[-1] for p in optional)]
        _expect(around, [counts.parts] * 2)
    return schedule.static_cycles(stretches, trips)


def cycles_of_steps(stretches: Sequence[schedule.Stretch], counts: Counts) -> float:
    """Cycles of one of JAX's kernels: a grid step a block, whose products are passed over if no pair is visible."""
    inner = [place for place, each in enumerate(stretches) if each.depth and not _copies(each)]
    trips = dict.fromkeys(inner, counts.steps)
    products = [place for place in inner if stretches[place].mxu]
    if not products or any(stretches[place].depth > 1 for place in inner):
        raise ValueError("the schedule has no products, or loops in the grid's loop, which was not expected")
    if counts.steps > 1:
        optional = conditional(stretches)
        before = [place for place in optional if place < products[0]]
        behind = [place for place in optional if place > products[-1]]
        _expect([len(before), len(behind)], [counts.parts] * 2)
        if products[0] not in optional and products[-1] not in optional:
            raise ValueError("the products of the schedule are not in a conditional part, as was expected")
        within = [place for place in inner if products[0] <= place <= products[-1]]
        trips |= dict.fromkeys(within, counts.masked + counts.clear)
        trips |= dict.fromkeys([*before, *behind], counts.ends)
    return schedule.static_cycles(stretches, trips)


def _vector(stretch):
    return sum(stretch.slots.get(name, 0) for name in ("VALU", "VSTORE", "XLU")) >= VECTOR


def _copies(stretch):
    """A fetch of a block from on-chip memory: registers loaded and stored and nothing else."""
    loads, stores, others = (
        sum(stretch.slots.get(n, 0) for n in names)
        for names in (("VLOAD",), ("VSTORE",), ("VALU", "XLU", "MXU", "EUP"))
    )
    return loads >= VECTOR and abs(loads - stores) <= 2 and not others


def _expect(found, wanted):
    if found != wanted:
        raise ValueError(f"the schedule has {found} conditional parts around its products, not {wanted}")
