"""The comparison with JAX's attention: how often each stretch of a schedule runs, and the table. Compiles nothing."""

import itertools

import pytest

from kernels.report import comparison
from kernels.report import comparison_cycles as cycles
from kernels.report import comparison_programs as programs
from kernels.report.comparison_cycles import Counts
from kernels.report.schedule import Stretch

ADDRESS = itertools.count()


def stretch(bundles, depth=1, label="", **slots):
    return Stretch(next(ADDRESS), bundles, depth, label, slots.get("MXU", 0), slots, 0)


def vector(bundles, depth=1, label=""):
    return stretch(bundles, depth, label, VALU=50)


def product(bundles, depth=1, label=""):
    return stretch(bundles, depth, label, VALU=50, MXU=50)


def copy(bundles):
    return stretch(bundles, VLOAD=64, VSTORE=64)


BEFORE = [stretch(5, 0), stretch(7, label="LB"), stretch(4, 0)]
LOOPS = [
    product(1000, 2, "LB"), stretch(1, 0), stretch(1, 2), stretch(4, label="PF"), stretch(4, 0),
    product(900, 2, "LB"), stretch(1, 2),
]  # fmt: skip
BEHIND = [stretch(9, label="PF"), stretch(5, 0)]


def test_our_loops_run_once_a_masked_and_once_a_clear_block():
    schedule = [*BEFORE, copy(66), vector(300), *LOOPS, vector(200, label="PF"), *BEHIND]
    assert cycles.cycles_of_loops(schedule, Counts(steps=8, ends=8, masked=8, clear=28)) == (
        8 * (7 + 300 + 4 + 200 + 9) + 8 * 1001 + 28 * 901
    )


def test_our_products_around_the_loops_run_once_a_step_that_visits_something():
    schedule = [*BEFORE, vector(300), product(400), *LOOPS, product(350), vector(200, label="PF"), *BEHIND]
    assert cycles.cycles_of_loops(schedule, Counts(steps=8, ends=8, masked=8, clear=28, walks=6)) == (
        8 * (7 + 300 + 4 + 200 + 9) + 6 * (400 + 350) + 8 * 1001 + 28 * 901
    )


def test_our_starts_and_finishes_run_once_a_block_of_several_fetches():
    schedule = [*BEFORE, stretch(60), vector(300), stretch(3, label="PF"), *LOOPS]
    schedule += [stretch(2, label="PF"), vector(200), *BEHIND]
    assert cycles.cycles_of_loops(schedule, Counts(steps=32, ends=16, masked=16, clear=120)) == (
        32 * (7 + 60 + 3 + 4 + 2 + 9) + 16 * (300 + 200) + 16 * 1001 + 120 * 901
    )
    around = [
        *schedule[:5],
        stretch(3, label="PF"),
        product(400),
        *schedule[5:12],
        product(350),
        *schedule[12:],
    ]
    assert cycles.cycles_of_loops(around, Counts(32, 16, 16, 120, walks=20)) == (
        32 * (7 + 60 + 3 + 3 + 4 + 2 + 9) + 16 * (300 + 200) + 20 * (400 + 350) + 16 * 1001 + 120 * 901
    )


@pytest.mark.parametrize("loops", [LOOPS[:5], [*LOOPS, *LOOPS]])
def test_our_schedule_must_have_two_loops(loops):
    with pytest.raises(ValueError, match="two with products were expected"):
        cycles.cycles_of_loops([*BEFORE, *loops, *BEHIND], Counts(8, 8, 8, 28))


def test_our_conditional_parts_are_expected_where_there_are_several_fetches():
    with pytest.raises(ValueError, match=r"\[0, 0\] conditional parts"):
        cycles.cycles_of_loops([*BEFORE, vector(300), *LOOPS, *BEHIND], Counts(32, 16, 16, 120))


def steps(*products):
    parts = [*BEFORE, copy(66), stretch(30), vector(60), stretch(8, label="PF"), stretch(4, 0)]
    return [*parts, *products, stretch(2, label="PF"), stretch(4, 0), vector(90), *BEHIND]


def test_products_of_jax_run_where_a_pair_is_visible():
    found = cycles.cycles_of_steps(steps(product(1400)), Counts(steps=64, ends=8, masked=8, clear=28))
    assert found == 64 * (7 + 30 + 8 + 2 + 9) + 8 * (60 + 90) + 36 * 1400


def test_a_single_step_of_jax_runs_everything():
    assert cycles.cycles_of_steps(steps(product(1400)), Counts(1, 1, 1, 0)) == 7 + 30 + 8 + 2 + 9 + 150 + 1400


@pytest.mark.parametrize("body", [(), (product(1400, 2, "LB"),), (product(900, label="LB"), vector(10))])
def test_another_structure_of_jax_is_an_error(body):
    with pytest.raises(ValueError, match="expected|conditional parts"):
        cycles.cycles_of_steps(steps(*body), Counts(64, 8, 8, 28))


@pytest.mark.parametrize(("T", "D", "masked", "clear", "fetches", "walks"), [
    (63, 128, 1, 0, 1, 1), (512, 64, 1, 0, 1, 1), (4096, 128, 8, 28, 1, 8), (16384, 128, 32, 496, 4, 80),
    (4096, 256, 8, 28, 2, 12),
])  # fmt: skip
def test_counts_of_ours(T, D, masked, clear, fetches, walks):
    """A walk takes one piece out of its loops; the forward pass has two pieces a block of 512."""
    counts, visited = programs.counts_of_ours(programs.Shape(T, D))
    assert visited == 1
    for name, count in counts.items():
        pieces = 2 if name == "forward" and T > 63 else 1
        assert count.masked + count.clear == pieces * (masked + clear) - walks
        assert count.masked == pieces * masked - masked and count.walks == walks
        assert (count.steps, count.ends) == (masked * fetches, masked)


def test_groups_start_once():
    counts, _ = programs.counts_of_ours(programs.Shape(4096, 128, 8, 1))
    assert counts["forward"].ends == 8 and counts["backward_kv"].ends == 1
    of_queries, of_keys = programs.counts_of_steps(programs.Shape(4096, 128, 8, 1), 512)
    assert of_queries == Counts(64, 8, 8, 28) and of_keys.ends == 1


def test_pruning_visits_fewer_blocks():
    counts, visited = programs.counts_of_ours(programs.Shape(4096, 128, pruned=True))
    count = counts["backward_q"]
    seen = count.masked + count.clear + count.walks
    assert count.walks == 8 and seen == pytest.approx(36 * visited) and visited < 0.9


def test_the_table_takes_the_better_one_of_jax_and_says_that_nothing_ran():
    row = {"T": 4096, "D": 128, "target": "v5e", "pruned": False, "visited": 1.0, "heads": 16, "kv_heads": 2}
    row |= {"gates": {"forward": 90.0, "backward": 300.0}, "no_gates": {"forward": 80.0, "backward": 250.0}}
    row |= {"splash": {"forward": 100.0, "backward": 200.0}, "flash": None, "errors": ["flash: no groups"]}
    text = comparison.markdown({"rows": [row]})
    assert text.startswith("\n## Beside JAX's own attention\n") and "nothing\nran" in text
    assert text.endswith(
        "| 4096 | 128 | 16 on 2 | v5e | 90 | 80 | 100 | - | 0.90 (0.80) | 300 | 250 | 200 | - | 1.50 (1.25) |\n"
    )
    row["gates"] |= {"forward_spills": 0, "backward_spills": 3}
    row["splash"] |= {"forward_spills": 6014, "backward_spills": 11413}
    text = comparison.markdown({"rows": [row]})
    assert text.endswith("| 4096 | 128 | 16 on 2 | v5e | 0 | - | 6014 | - | 3 | - | 11413 | - |\n")
