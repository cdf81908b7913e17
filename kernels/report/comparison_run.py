"""Compiles the attentions to compare and counts the cycles of their schedules, one row a shape."""

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from kernels.report import case, schedule, targets
from kernels.report import comparison_cycles as cycles
from kernels.report import comparison_programs as programs

PASSES = ("forward", "backward")
LONG = (
    4096  # beyond it the compiler lays out the operands of JAX's kernels otherwise: up to 3 % in their cycles
)
THEIRS = {
    "splash": (("_fwd", "_dq", "_dkv"), programs.splash),
    "flash": (("jvp_jit_flash", "flash_mha_bwd_dq", "flash_mha_bwd_dkv"), programs.flash),
}  # what the kernels' names contain, and the program


def measure(shapes: Sequence[programs.Shape], folder: Path, say: Callable = print) -> list[dict]:
    """One row a shape; `folder` is where the compiler writes its dumps, emptied before each compile."""
    memory, rows = {}, {}
    for shape in sorted(shapes, key=lambda each: -each.T):  # the longest stands for those like it
        rows[shape] = _row(shape, folder, memory)
        say(rows[shape], flush=True)
    return [rows[shape] for shape in shapes]


def _row(shape, folder, memory):
    ours, visited = programs.counts_of_ours(shape)
    row = {"T": shape.T, "D": shape.D, "target": shape.target, "pruned": shape.pruned, "visited": visited}
    heads, blocks = programs.HIDDEN // shape.D, programs.blocks_of(shape.T)
    row |= {"heads": heads, "kv_heads": heads * shape.K // shape.H, "errors": []}
    jobs = {
        "gates": lambda: _ours(shape, ours, True, folder, memory),
        "no_gates": lambda: None if shape.pruned else _ours(shape, ours, False, folder, memory),
        "splash": lambda: _best([_steps("splash", shape, block, folder, memory) for block in blocks]),
        "flash": lambda: _steps("flash", shape, blocks[0], folder, memory) if shape.H == shape.K else None,
    }
    for name, job in jobs.items():
        try:
            row[name] = job()
        except Exception as error:  # whatever the compilers raise is the result
            row[name] = None
            row["errors"].append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
    return row


def _best(found):
    best = {which: min(found, key=lambda each: each[which]) for which in PASSES}
    return {name: each[name] for which, each in best.items() for name in (which, f"{which}_spills")}


def _ours(shape, counts, gated, folder, memory):
    several = tuple((c.steps > 1, c.steps > c.ends) for c in counts.values())  # blocks, and fetches for each
    alike = ("ours", gated, shape._replace(T=0), programs.sizes_of(shape), several)
    if not gated:
        counts = {name: count._replace(parts=1) for name, count in counts.items()}  # no such sums
    prefix = "forgetting" if gated else "streaming"
    names = [f"{prefix}_{name}" for name in counts]
    found = _schedules(alike, lambda: programs.ours(shape, gated), names, shape.target, folder, memory)
    return _passes(cycles.cycles_of_loops, found, counts.values())


def _steps(what, shape, block, folder, memory):
    of_queries, of_keys = programs.counts_of_steps(shape, block)
    several = (of_queries.steps > 1, shape.T > LONG)
    alike = (what, shape._replace(T=0, pruned=False), block, several)
    names, make = THEIRS[what]
    program = functools.partial(make, shape._replace(T=programs.filled(shape.T)), block)
    found = _schedules(alike, program, names, shape.target, folder, memory)
    return _passes(cycles.cycles_of_steps, found, (of_queries, of_queries, of_keys))


def _passes(cycles_of, schedules, counts):
    forward, *backward = (cycles_of(each, count) for each, count in zip(schedules, counts, strict=True))
    forward_spills, *backward_spills = map(schedule.spills, schedules)
    return {
        "forward": forward, "forward_spills": forward_spills,
        "backward": sum(backward), "backward_spills": sum(backward_spills),
    }  # fmt: skip


def _schedules(alike, program, names, target, folder, memory):
    """The schedules of the kernels of a program and its gradient, compiled unless one alike was."""
    if alike not in memory:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        function, operands = program()
        targets.compile_for(target, case.differentiated(function), *operands)
        memory[alike] = [schedule.stretches(folder, name) for name in names]
    return memory[alike]
