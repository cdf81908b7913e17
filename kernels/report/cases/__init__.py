"""The shapes of the report, one file a kernel room: every `CASES` in this folder."""

import importlib
import pkgutil

from kernels.report.case import KernelCase


def all_cases() -> tuple[KernelCase, ...]:
    """The cases of every room, in the order of the rooms' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(case for name in names for case in importlib.import_module(f"{__name__}.{name}").CASES)
