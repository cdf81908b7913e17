"""One module a paper: which files are its, and how to compute what they hold."""

import functools
import importlib
import pkgutil


@functools.cache
def load() -> tuple[str, ...]:
    """Import every module here, which registers its families; returns a sentence for each that cannot be imported."""
    failures = []
    for module in pkgutil.iter_modules(__path__):
        try:
            importlib.import_module(f"{__name__}.{module.name}")
        except ImportError as error:
            failures.append(f"the families of {module.name} cannot be loaded: {error}")
    return tuple(failures)
